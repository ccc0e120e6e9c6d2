"""AutoRound on a language model, to compare with ours. Runs in the environment of `make autoround`, imports nothing of
vlmdeploy.

    python autoround_worker.py FOLDER BITS GROUP ITERATIONS

FOLDER holds a LlamaForCausalLM (config.json, model.safetensors, tokenizer.json) and calibration.npy, int64 [sequences,
tokens]. Writes quantized.safetensors there: the linears of every layer, dequantized, float32. Groups are symmetric.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BATCH = 8


def main() -> None:
    folder, (bits, group, iterations) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    ids = torch.from_numpy(np.load(folder / "calibration.npy"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    rounding = AutoRound(
        model, tokenizer=tokenizer, scheme="W4A16", bits=bits, group_size=group, sym=True, iters=iterations,
        dataset=list(torch.split(ids, BATCH)), seqlen=ids.shape[1], nsamples=len(ids), batch_size=BATCH,
        device_map="cpu", amp=False,
    )  # fmt: skip
    quantized, _ = rounding.quantize()
    linears = {
        f"{name}.weight": module.weight.detach().float().contiguous()
        for name, module in quantized.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    }
    save_file(linears, folder / "quantized.safetensors")


if __name__ == "__main__":
    main()
