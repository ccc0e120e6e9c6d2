"""GPTQModel's own GPTQ on one matrix at a time, for comparison with ours. Runs inside the environment that `make
gptqmodel` builds and imports nothing of vlmdeploy; the benchmark that uses it talks JSON lines with it.

Asked on stdin: {"weights": W.npy [out, in] float32, "hessian": H.npy [in, in] = X^T X / tokens, "num_tokens": int,
"bits": int, "group_size": int, "out": result.npz}. Answered on stdout: {"seconds": of its quantize(), "peak_rss_bytes":
while it ran}, or {"error": text}. The result holds codes uint8 [out, in], scales float16 and zeros uint8 [out, groups]:
what GPTQModel would pack, that is codes chosen with float32 scales, which are rounded to fp16 afterwards.
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
    """Its task object (private API of 7.7.0) with its default settings, as if `num_tokens` inputs had gone through.

    add_batch sums X^T X, and the reduction that follows multiplies by 2 / tokens: the state after it is set here, as
    adopt_hessian_from does for linears that share their input.
    """
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    weights = torch.from_numpy(np.load(request["weights"]))
    linear = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weights, requires_grad=False)
    config = QuantizeConfig(bits=request["bits"], group_size=request["group_size"], offload_to_disk=False)
    task = GPTQ(linear, config)
    task.quantizer.configure(perchannel=True)
    task.fallback = None  # else too few tokens silently become rounding to nearest
    task.H = torch.from_numpy(np.load(request["hessian"])).float().mul_(2.0)
    task.nsamples = request["num_tokens"]
    task.fwd_counter = 1
    task._hessian_dirty = False
    return task


def reset_peak() -> None:
    """Let the kernel's high-water mark start from the present size, where it allows that."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
