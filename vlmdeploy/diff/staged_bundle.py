"""A bundle as a sequence of stages: each is cut out of its graph and runs in ONNX Runtime on the CPU, with the
arithmetic that the bundle ships. Graphs for TensorRT or CUDA run there too; engines are ignored.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vlmdeploy.diff.stage_graphs import INPUT, StageGraphs
from vlmdeploy.diff.staged_checkpoint import Arithmetic, StagedModel, StageGeometry
from vlmdeploy.export.gate.sample import InputRules
from vlmdeploy.export.gate.taps import edit_graph
from vlmdeploy.layout import Ints
from vlmdeploy.manifest import ENGINES, Manifest
from vlmdeploy.overriding import override
from vlmdeploy.runtime.backends.door import GRAPH_OF_EXPERT, decoder_graph
from vlmdeploy.runtime.backends.lanes import Call, Floats
from vlmdeploy.runtime.backends.ort import OrtBackend, import_onnxruntime, load_session
from vlmdeploy.runtime.chat import Tokenizer
from vlmdeploy.runtime.embedding import EmbeddingTable
from vlmdeploy.runtime.generate import Prompt, pieces_of
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.session import bundle_tokenizer


class StagedBundle(StagedModel):
    """A bundle of any target."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        """Check the files and read the graphs without weights; raises BundleError and BackendError."""
        self._ort = import_onnxruntime()
        self._threads = threads
        self._files = check_bundle(folder, without=f"{ENGINES}/")
        self._manifest = self._files.manifest
        self._graphs = {graph: self._read_graph(graph) for graph in self._manifest.graphs}
        self.name = str(folder)
        self.geometry = _geometry(self._manifest, self._graphs)
        self.rules = InputRules.of_bundle(self._manifest)
        self.template = self._manifest.template(None)
        self.arithmetic = _arithmetic(self._manifest)

    def _read_graph(self, graph: str) -> StageGraphs:
        model = onnx.load_from_string(self._files.graph(graph))
        edit_graph(model, self._manifest, False, self._files.folder)
        return StageGraphs(model)

    @override
    def tokenizer(self) -> Tokenizer | None:
        return bundle_tokenizer(self._files) if self._manifest.has_tokenizer else None

    @override
    def text_rows(self, ids: Ints) -> Floats:
        return EmbeddingTable(self._files)[ids]

    @override
    def run(self, stage: str, inputs: Sequence[Floats], prompt: Prompt) -> list[Floats]:
        if stage.startswith("decoder.layer."):
            return self._decoder_layer(stage, inputs, prompt)
        graph = self._manifest.token_graph if stage in ("decoder.norm", "logits") else "vision"
        source, value = self._ends(graph, stage)
        session = self._session(graph, self._graphs[graph].cut(source, [value]))
        name = source if stage == "vision.embed" else INPUT
        return [session.run([value], {name: x})[0] for x in inputs]

    def _ends(self, graph: str, stage: str) -> tuple[str, str]:
        """Names of a stage's input and output in its graph."""
        values = self._graphs[graph].values
        if stage == "logits":
            return "asked", values[stage]  # the rows gathered by logit_rows: here all of them
        before = list(values)[list(values).index(stage) - 1]
        source = "pixels" if stage == "vision.embed" else values[before]
        return source, values[stage]

    def _session(self, graph: str, model: onnx.ModelProto) -> Any:
        dialect, path = self._manifest.dialect, self._files.folder / self._manifest.graphs[graph].file
        content = model.SerializeToString()
        return load_session(self._ort, path, content, "cpu", self._threads, dialect, keeps_outputs=True)

    def _decoder_layer(self, stage: str, inputs: Sequence[Floats], prompt: Prompt) -> list[Floats]:
        """Both experts of one layer, over a KV cache of one layer."""
        index = int(stage.rpartition(".")[2])

        def load(graph: str) -> Any:
            parts = self._graphs[graph]
            source = parts.values[f"decoder.layer.{index - 1}"] if index else INPUT
            wanted = [parts.values[stage]] if stage in parts.values else []
            return self._session(graph, parts.cut(source, wanted, index))

        manifest = replace(self._manifest, cache=replace(self._manifest.cache, num_layers=1))
        backend = OrtBackend(replace(self._files, manifest=manifest), self._threads, load_graph=load)
        return [self._run_pieces(backend, stage, x, prompt) for x in inputs]

    def _run_pieces(self, backend: OrtBackend, stage: str, x: Floats, prompt: Prompt) -> Floats:
        """Rows [seq, hidden] through the layer, piece by piece; NaN where no graph computes a row."""
        lanes, result = backend.new_lanes(1, len(x)), np.full_like(x, np.nan)
        lanes.begin(0, prompt.positions)
        for start, stop in pieces_of(prompt.vision_mask, backend):
            mask, rows = prompt.vision_mask[start:stop], x[start:stop]
            value = self._graphs[decoder_graph(self._manifest, mask)].values.get(stage)
            wanted = (value,) if value else ()
            outputs = backend.run_graph(Call.of_one(rows, mask, np.arange(len(rows))), lanes, wanted)
            if value:
                result[start:stop] = outputs[value]
        return result


def _arithmetic(manifest: Manifest) -> Arithmetic:
    kinds = {kind for precision in manifest.precision.values() for kind in precision.split("+")}
    if kinds & {"int2", "int3", "int4"}:
        return "int4"
    return "int8" if "int8" in kinds else "fp16" if "fp16" in kinds else "float32"


def _geometry(manifest: Manifest, graphs: dict[str, StageGraphs]) -> StageGeometry:
    """The geometry of a bundle: mostly from its manifest, the rest from its vision graph."""
    vision, tokens = graphs["vision"], manifest.tokens
    return StageGeometry(
        family=manifest.family,
        image_px=manifest.image.size_px,
        image_mean=manifest.image.mean,
        image_std=manifest.image.std,
        rows_per_image=tokens.rows_per_image,
        vision_layers=sum(stage.startswith("vision.layer.") for stage in vision.values),
        vision_width=vision.dims("vision.class_embedding")[0],
        connector_steps=tuple(stage.partition(".")[2] for stage in vision.values if stage.startswith("connector.")),
        decoder_layers=manifest.cache.num_layers,
        hidden=manifest.embedding.hidden,
        kv_heads=manifest.cache.kv_heads,
        padded_head_dim=manifest.cache.head_dim,
        experts=tuple(expert for expert, graph in GRAPH_OF_EXPERT.items() if manifest.is_routed or graph in graphs),
        vocab_size=manifest.embedding.vocab_size,
        bos_id=tokens.bos_id,
        placeholder_id=tokens.placeholder_id,
    )
