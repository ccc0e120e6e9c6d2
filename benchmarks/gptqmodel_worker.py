"""GPTQModel's GPTQ on one matrix at a time, to compare with ours. Runs in the environment of `make gptqmodel`, imports
nothing of vlmdeploy, and exchanges JSON lines with the benchmark.

Request on stdin: {"weights": W.npy [out, in] float32, "hessian": H.npy [in, in] = X^T X / tokens, "num_tokens": int,
"bits": int, "group_size": int, "out": result.npz}. Answer on stdout: {"seconds": of quantize(), "peak_rss_bytes"}, or
{"error": text}. The result holds codes uint8 [out, in], scales float16 and zeros uint8 [out, groups], as GPTQModel
packs them: codes chosen with float32 scales, which are rounded to fp16 afterwards.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

Request = dict[str, Any]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the library logs to stdout
    for line in sys.stdin:
        try:
            answer = quantize(json.loads(line))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def quantize(request: Request) -> dict[str, float | str]:
    task = gptq_task(request)
    reset_peak()
    start = time.perf_counter()
    quantized, scales, zeros, g_idx = task.quantize()[:4]
    seconds, peak = time.perf_counter() - start, peak_rss_bytes()
    group = g_idx.long()
    codes = torch.round(quantized / scales[:, group] + zeros[:, group])
    np.savez(
        request["out"],
        codes=codes.to(torch.uint8).numpy(),
        scales=scales.to(torch.float16).numpy(),
        zeros=zeros.to(torch.uint8).numpy(),
    )
    return {"seconds": seconds, "peak_rss_bytes": peak}


def gptq_task(request: Request) -> Any:
    """Its task object (private API of 7.7.0) with default settings, in the state after `num_tokens` inputs.

    add_batch sums X^T X, and the later reduction multiplies by 2 / tokens. This sets the result, as adopt_hessian_from
    does for linears with the same input.
    """
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    weights = torch.from_numpy(np.load(request["weights"]))
    linear = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weights, requires_grad=False)
    config = QuantizeConfig(bits=request["bits"], group_size=request["group_size"], offload_to_disk=False)
    task = GPTQ(linear, config)
    task.quantizer.configure(perchannel=True)
    task.fallback = None  # otherwise too few tokens silently fall back to rounding to nearest
    task.H = torch.from_numpy(np.load(request["hessian"])).float().mul_(2.0)
    task.nsamples = request["num_tokens"]
    task.fwd_counter = 1
    task._hessian_dirty = False
    return task


def reset_peak() -> None:
    """Reset the kernel's high-water mark to the current size, if it allows that."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
