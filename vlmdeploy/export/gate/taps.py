"""Runs a bundle's graphs with inner values as extra outputs, for verification.

Graphs are edited in memory only and keep the bundle's external data.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vlmdeploy.export.gate.sample import GateSample
from vlmdeploy.export.graphs.decoder import branches, decoder_taps
from vlmdeploy.export.graphs.ort_dialect import FULL_ACCURACY
from vlmdeploy.export.graphs.vision import vision_taps
from vlmdeploy.kernels import cpu
from vlmdeploy.manifest import Manifest
from vlmdeploy.runtime.backends.door import decoder_graph
from vlmdeploy.runtime.backends.lanes import Call, Floats, slot_positions
from vlmdeploy.runtime.backends.ort import OrtBackend, import_onnxruntime, load_session
from vlmdeploy.runtime.embedding import EmbeddingTable
from vlmdeploy.runtime.integrity import BundleFiles
from vlmdeploy.spec.model import ModelSpec


class TappedRun:
    """One pass of the sample through a bundle, including decoded tokens, with its inner values.

    `stages` maps a stage's name to its value: [1, ...] for the encoder, [seq, hidden] for the decoder, NaN in rows that
    the bundle does not compute. Per layer keys, values [kv_heads, seq, padded head_dim]; logits of the language
    expert's positions, in order, [text, vocab].
    """

    def __init__(
        self, spec: ModelSpec, files: BundleFiles, sample: GateSample, exact: bool, threads: int | None
    ) -> None:
        self.spec = spec
        self.sample = sample
        self.ids = sample.ids
        self.stages: dict[str, Floats] = {}
        taps = _taps_of(spec, files.manifest.is_routed)
        backend = tapped_backend(files, exact, threads, {graph: list(taps[graph].values()) for graph in taps})
        self._run_vision(backend, taps["vision"])
        backend.drop("vision")
        self._run_decoder(backend, EmbeddingTable(files), taps, files.manifest)

    def _run_vision(self, backend: OrtBackend, taps: dict[str, str]) -> None:
        values = backend.session("vision").run([*taps.values(), "rows"], {"pixels": self.sample.prompt.pixels})
        self.stages.update(zip(taps, values, strict=False))
        self.image_rows: Floats = values[-1][0]

    def _run_decoder(
        self, backend: OrtBackend, embedding: EmbeddingTable, taps: dict[str, dict[str, str]], manifest: Manifest
    ) -> None:
        prompt, total = self.sample.prompt, len(self.ids)
        rows = embedding[self.ids]
        rows[: len(prompt.ids)][prompt.types == 1] = self.image_rows
        self.stages["decoder.input"] = rows
        self.vision_mask = np.zeros(total, np.bool_)
        self.vision_mask[: len(prompt.ids)] = prompt.vision_mask
        logits: list[Floats] = []
        lanes = backend.new_lanes(1, total)
        lanes.begin(0, slot_positions(prompt.positions, total))
        for start, stop in _calls(self.sample, backend.mixes_experts):
            mask = self.vision_mask[start:stop]
            names, asked = taps[decoder_graph(manifest, mask)], () if mask.all() else ("logits",)
            call = Call.of_one(rows[start:stop], mask, np.flatnonzero(~mask))
            outputs = backend.run_graph(call, lanes, (*names.values(), *asked))
            for stage, name in names.items():
                self.stages.setdefault(stage, np.full_like(rows, np.nan))[start:stop] = outputs[name]
            logits += [outputs[name] for name in asked]
        self.logits = np.concatenate(logits)
        self.keys = [lanes.floats(f"key.{layer}")[0] for layer in range(self.spec.decoder.num_layers)]
        self.values = [lanes.floats(f"value.{layer}")[0] for layer in range(self.spec.decoder.num_layers)]


def _calls(sample: GateSample, mixes_experts: bool) -> list[tuple[int, int]]:
    """Row ranges of the graph calls: the prompt's segments (the whole prompt if the backend mixes experts), then the
    decoded tokens one by one, then the second turn at once."""
    prompt_length, first_turn_length = len(sample.prompt.ids), len(sample.prompt.ids) + len(sample.decode_ids)
    changes = [] if mixes_experts else (np.flatnonzero(np.diff(sample.prompt.vision_mask)) + 1).tolist()
    edges = [0, *changes, prompt_length]
    tokens = [(row, row + 1) for row in range(prompt_length, first_turn_length)]
    turn = [(first_turn_length, len(sample.ids))] if len(sample.turn_ids) else []
    return [*pairwise(edges), *tokens, *turn]


def _taps_of(spec: ModelSpec, is_routed: bool) -> dict[str, dict[str, str]]:
    """The stages to read of each graph: stage name -> name of the value in the graph."""
    decoders = {name: decoder_taps(spec.decoder, branch) for name, branch in branches(spec.decoder, is_routed).items()}
    return {"vision": _thinned(vision_taps(spec), spec.vision.num_layers), **decoders}


def _thinned(taps: dict[str, str], num_layers: int) -> dict[str, str]:
    """Keep about eight layers of the encoder, including the last, so that large pictures fit in memory."""
    every = -(-num_layers // 8)
    kept = {f"vision.layer.{index}" for index in range(num_layers) if (num_layers - 1 - index) % every == 0}
    return {stage: name for stage, name in taps.items() if not stage.startswith("vision.layer.") or stage in kept}


def tapped_backend(
    files: BundleFiles,
    exact: bool,
    threads: int | None,
    taps: Mapping[str, list[str]],
    residency: str = "all",
) -> OrtBackend:
    """A backend on a bundle's graphs, edited in memory: inner values as extra outputs, a KV cache of any length, and
    if `exact` float32 arithmetic instead of int8 activations or fp16."""
    ort, manifest = import_onnxruntime(), files.manifest

    def load(graph: str) -> Any:
        path = files.folder / manifest.graphs[graph].file
        model = onnx.load_from_string(files.graph(graph))
        edit_graph(model, manifest, exact, path.parent)
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in taps.get(graph, ())
        )
        return load_session(
            ort, path, model.SerializeToString(), "cpu", threads, manifest.dialect, keeps_outputs=True,
            own_operators=not exact,
        )  # fmt: skip

    cache_type = "fp32" if exact else None
    return OrtBackend(files, threads, residency, load_graph=load, cache_type=cache_type)


def edit_graph(model: onnx.ModelProto, manifest: Manifest, exact: bool, folder: Path) -> None:
    """Change a graph in place for verification; see `tapped_backend`."""
    if manifest.dialect == "trt":
        free_cache_length(model)
    if exact:
        set_accuracy(model, FULL_ACCURACY)
        if manifest.is_half:
            widen_floats(model, folder)
        elif manifest.cache.dtype != "fp32":
            widen_cache(model, cpu.SUFFIXES[manifest.cache.dtype])


def set_accuracy(model: onnx.ModelProto, level: int) -> None:
    """Change the accuracy_level of every product of codes in place."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level


def widen_cache(model: onnx.ModelProto, suffix: str) -> None:
    """Replace attention over a narrow cache, whose operators end in `suffix`, by the one over float32, in place."""
    for values in (model.graph.input, model.graph.output):
        kept = [value for value in values if "_scales." not in value.name]
        del values[:]
        values.extend(kept)
        for value in values:
            if value.name.startswith(("past_", "present_")):
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        if node.domain == cpu.COMPILED_DOMAIN:
            node.domain, node.op_type = cpu.DOMAIN, node.op_type.removesuffix(suffix)
            for names in (node.input, node.output):
                kept = [name for name in names if "_scales." not in name]
                del names[:]
                names.extend(kept)


def free_cache_length(model: onnx.ModelProto) -> None:
    """Let the KV cache have any length, so that a short prompt needs a short one."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_", "present_")):
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"


def widen_floats(model: onnx.ModelProto, folder: Path) -> None:
    """Turn every fp16 value into float32: the same graph on the same stored weights, without the rounding between.

    Matrices are widened when they are used. Scales are so now, in memory: ONNX Runtime wants them constant.
    """
    graph = model.graph
    scales = {node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    widened = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16 and tensor.name in scales:
            values = numpy_helper.to_array(tensor, str(folder))
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
        elif tensor.data_type == TensorProto.FLOAT16:
            name, tensor.name = tensor.name, f"{tensor.name}.stored"
            widened.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*widened, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
