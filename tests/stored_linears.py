"""What quantized checkpoints and bundles hold, read from their files by a few lines of numpy that share no code with
vlmdeploy: every linear as steps (code minus zero point) and the scale of every weight."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

Array = NDArray[Any]
StoredLinear = tuple[Array, Array]  # steps int64 [out, in], scales float32 [out, in]


def unpack(words: Array, bits: int, count: int) -> Array:
    """int32 words [words, columns], each column a stream of bits -> codes [count, columns]."""
    stream = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : count * bits].reshape(len(stream), count, bits).astype(np.int64)
    return np.asarray((fields << np.arange(bits)).sum(-1).T)


def gptq_linears(folder: Path) -> dict[str, StoredLinear]:
    """Every quantized linear of a checkpoint (format v1) by its name there, without ".weight"."""
    tensors = stored_tensors(folder)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {module: _gptq_linear(tensors, module) for module in modules}


def stored_tensors(folder: Path) -> dict[str, Array]:
    """Every tensor of a checkpoint; bf16 ones, which numpy has no type for, as float32."""
    tensors = {name: values for path in folder.glob("*.safetensors") for name, values in load_file(path).items()}
    return {
        name: (values.float() if values.dtype == torch.bfloat16 else values).numpy() for name, values in tensors.items()
    }


def _gptq_linear(tensors: dict[str, Array], module: str) -> StoredLinear:
    qweight, qzeros, scales, groups = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    bits = 32 * len(qweight) // len(groups)
    codes = unpack(qweight, bits, len(groups))  # [in, out]
    zeros = unpack(qzeros.T, bits, scales.shape[1]).T + 1  # [groups, out]
    return (codes - zeros[groups]).T, scales[groups].T.astype(np.float32)


def onnx_linears(bundle: Path) -> dict[str, StoredLinear]:
    """Every MatMulNBits of a bundle's graphs by our parameter name."""
    found: dict[str, StoredLinear] = {}
    for path in sorted(bundle.glob("*.onnx")):
        model = onnx.load(str(path))
        tensors = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type in ("MatMulNBits", "QuantizedLinear", "GatedLinear", "GeluLinear"):
                found[node.input[1]] = _matmul_linear(node, tensors)
    return found


def _matmul_linear(node: onnx.NodeProto, tensors: dict[str, Array]) -> StoredLinear:
    sizes = {item.name: item.i for item in node.attribute}
    bits, block, width = sizes["bits"], sizes["block_size"], sizes["K"]
    codes = _fields(tensors[node.input[1]].reshape(sizes["N"], -1), bits)[:, :width]
    zeros = np.full((sizes["N"], width // block), 1 << (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        zeros = _fields(tensors[node.input[3]].reshape(sizes["N"], -1), bits)[:, : width // block]
    scales = tensors[node.input[2]].reshape(sizes["N"], -1)
    return codes - zeros.repeat(block, 1), scales.repeat(block, 1)


def _fields(rows: Array, bits: int) -> Array:
    """Bytes [rows, bytes] -> fields of 2, 4 or 8 bits, the lowest first."""
    fields = rows[..., None] >> np.arange(0, 8, bits) & ((1 << bits) - 1)
    return fields.reshape(len(rows), -1).astype(np.int64)
