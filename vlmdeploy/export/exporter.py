"""Exports a checkpoint as a bundle: writes graphs and embedding aside, verifies them against PyTorch, then publishes.

Peak memory depends on the largest tensor, not the model: weights are read and written in blocks, and the gate holds one
PyTorch layer at a time.
"""

from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import vlmdeploy
from vlmdeploy.artifact import check_not_read, check_output, staged_folder
from vlmdeploy.bundle import hash_file, is_bundle, write_manifest
from vlmdeploy.errors import ExportError
from vlmdeploy.export.engines.build import (
    built_for,
    check_fit,
    check_options,
    check_plugin,
    compile_engines,
    engine_files,
    plan_engines,
)
from vlmdeploy.export.gate.verify import CheckedBundle, verify_staged
from vlmdeploy.export.graphs.builder import DataFile, GraphBuilder
from vlmdeploy.export.graphs.decoder import branches, build_decoder
from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.export.graphs.ort_dialect import OrtCudaGraph, OrtGraph
from vlmdeploy.export.graphs.routed_dialect import RoutedTrtGraph, check_routed
from vlmdeploy.export.graphs.trt_dialect import TrtGraph
from vlmdeploy.export.graphs.vision import build_vision
from vlmdeploy.export.options import ExportOptions
from vlmdeploy.export.weight_reader import WeightReader, stored_precisions
from vlmdeploy.kernels.packing import PACKING_VERSION
from vlmdeploy.manifest import (
    CACHE_GROUP,
    ENGINES,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    CacheShape,
    EmbeddingInfo,
    FileEntry,
    GraphInfo,
    Manifest,
    PluginUse,
    Provenance,
    format_of,
)
from vlmdeploy.model.checkpoint import LICENCE_PATTERNS, Checkpoint
from vlmdeploy.model.tokenizer import find_tokenizer, import_tokenizer
from vlmdeploy.progress import Progress, no_progress
from vlmdeploy.quant.grid import pack_nibbles
from vlmdeploy.quant.precision import encoder_warning, is_tensorrt, plan_precision, plan_warnings
from vlmdeploy.quant.quantization_report import REPORT_NAME
from vlmdeploy.runtime.backends.door import ROUTED_GRAPH
from vlmdeploy.runtime.backends.trt_library import import_tensorrt, library_of
from vlmdeploy.runtime.integrity import BundleFiles
from vlmdeploy.runtime.trust import record_trust
from vlmdeploy.spec.model import ModelSpec, with_settings

EMBEDDING_NAME = "embedding.bin"


def export_bundle(
    ckpt: str | Path, out: Path, options: ExportOptions, progress: Progress = no_progress
) -> tuple[Manifest, tuple[str, ...]]:
    """Export a checkpoint as a verified bundle at `out`; returns the manifest and warnings.

    Raises ConfigError and WeightsError for the checkpoint, ExportError for the output and ParityError if a stage
    differs from PyTorch; `out` is then as it was before.
    """
    check_output(out, options.force, is_bundle)
    check_not_read(out, (Path(ckpt), options.tokenizer))
    cache_type = options.cache_type  # raises before anything is read
    checkpoint = Checkpoint(ckpt, options.follow_links)
    spec = with_settings(checkpoint.spec, options.context_tokens, options.default_template, options.image_recipe)
    stored = stored_precisions(checkpoint)
    plan = plan_precision(spec, options.target, options.precisions, options.group, stored=stored)
    if options.is_routed:
        check_routed(spec, plan)
    check_options(options.target, options.build)
    check_plugin(f"--target {options.target}", options.build, options.is_routed)
    is_compiled = options.target.startswith("rtx-")  # on any machine; trt engines on the device, by `vlmdeploy build`
    library = import_tensorrt(library_of(options.target)) if is_compiled else None
    reader = WeightReader(checkpoint, plan)
    cache = HeadLayout(spec.decoder).cache_shape(checkpoint.inv_freq().numpy(), cache_type)
    if cache.dtype == "int8" and cache.head_dim % CACHE_GROUP:
        raise ExportError(f"--kv int8: heads have {cache.head_dim} values, expected a multiple of {CACHE_GROUP}")
    warnings = [*plan_warnings(plan, options.group), *_rounded_floats(reader)]
    warnings += encoder_warning(plan, spec) if is_tensorrt(options.target) else ()
    with staged_folder(out, options.force, is_bundle) as folder:
        has_tokenizer = _write_tokenizer(checkpoint, options, folder, warnings)
        checkpoint.copy_files((*LICENCE_PATTERNS, REPORT_NAME), folder)  # the runtime reads none of them
        graphs, hashes = _write_graphs(reader, spec, options, cache, folder, progress)
        embedding, hashes[EMBEDDING_NAME] = _write_embedding(reader, folder)
        manifest = _manifest(reader, spec, options, graphs, embedding, cache, has_tokenizer)
        check_fit(folder, manifest, options.build)
        parts = plan_engines(folder, manifest, options.build) if library else []
        subject = CheckedBundle(str(out), reader, spec, BundleFiles(folder, manifest), options.threads)
        verification, record = verify_staged(subject, options.seed, progress)
        record.write(folder)
        files = {path.name: hashes.get(path.name) or hash_file(path) for path in _bundle_files(folder)}
        manifest = replace(manifest, verification=verification, memory_bytes=_memory_bytes(manifest, files))
        if library:
            into = folder / ENGINES
            into.mkdir()
            capabilities = built_for(library, options.build)
            engines = compile_engines(folder, manifest, parts, options.build, capabilities, into, progress)
            manifest = replace(manifest, engines=engines)
            files |= engine_files(into)
        manifest = replace(manifest, files=files)
        write_manifest(folder, manifest)
    if library:
        record_trust(out, hash_file(out / MANIFEST_NAME).sha256)  # its engines were built here
    return manifest, tuple(warnings)


def _write_tokenizer(checkpoint: Checkpoint, options: ExportOptions, folder: Path, warnings: list[str]) -> bool:
    source = find_tokenizer(options.tokenizer or checkpoint.folder, options.follow_links)
    if source is None:
        if options.tokenizer is not None:
            raise ExportError(f"{options.tokenizer}: holds no tokenizer.json and no tokenizer.model")
        warnings.append(
            f"{checkpoint.folder} holds no tokenizer.json and no tokenizer.model: the bundle takes ids only; give "
            "--tokenizer FILE for text"
        )
        return False
    tokenizer = import_tokenizer(source)
    vocab_size = checkpoint.spec.decoder.vocab_size
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise ExportError(f"{source}: has ids up to {largest}, the model's vocabulary only 0..{vocab_size - 1}")
    (folder / TOKENIZER_NAME).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return True


def _write_graphs(
    reader: WeightReader,
    spec: ModelSpec,
    options: ExportOptions,
    cache: CacheShape,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, GraphInfo], dict[str, FileEntry]]:
    """Write every graph and its data file; also returns the hashes of the data files, computed while writing."""
    graphs, hashes = {}, {}
    decoders = branches(spec.decoder, options.is_routed)
    names = ["vision", *decoders]
    for index, name in enumerate(names):
        progress("graphs", index, len(names))
        with DataFile(folder / f"{name}.data") as data:
            builder = _builder(name, reader, options, data, cache, spec.decoder.context_tokens)
            if name == "vision":
                build_vision(builder, spec)
            else:
                build_decoder(builder, spec.decoder, decoders[name])
        graphs[name] = builder.write(folder)
        hashes[data.path.name] = data.entry()
    progress("graphs", len(names), len(names))
    return graphs, hashes


def _builder(
    name: str, reader: WeightReader, options: ExportOptions, data: DataFile, cache: CacheShape, context_tokens: int
) -> GraphBuilder:
    """A graph in the dialect of the target and its provider."""
    if is_tensorrt(options.target):
        dialect = RoutedTrtGraph if name == ROUTED_GRAPH else TrtGraph
        return dialect(name, reader, data, cache, context_tokens)
    kind = OrtCudaGraph if options.provider == "cuda" else OrtGraph
    return kind(name, reader, data, cache)


def _write_embedding(reader: WeightReader, folder: Path) -> tuple[EmbeddingInfo, FileEntry]:
    """Write the embedding table in its planned precision: rows, then (aligned) the scales of int8 and int4 rows."""
    target = "embedding.weight"
    precision = reader.plan[target]
    rows, hidden = reader.matrix_shape(target)
    scales = np.empty((rows, hidden // precision.group_size if precision.bits else 0), np.float16)
    with DataFile(folder / EMBEDDING_NAME) as data:
        data.append(_embedding_blocks(reader, target, scales))
        offset = data.append([scales])[0] if precision.bits else 0
    kinds: dict[str, Literal["fp32", "fp16", "int8", "int4"]] = {
        "fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int4"
    }  # fmt: skip
    info = EmbeddingInfo(EMBEDDING_NAME, kinds[precision.type], rows, hidden, precision.group_size, offset)
    return info, data.entry()


def _embedding_blocks(reader: WeightReader, target: str, scales: NDArray[np.float16]) -> Iterable[NDArray[np.generic]]:
    precision = reader.plan[target]
    for start, stop in reader.blocks(target):
        if precision.bits:
            part = reader.quantized(target, start, stop)
            scales[start:stop] = part.scales
            yield pack_nibbles(part.codes) if precision.bits == 4 else part.codes
        else:
            read = reader.half_rows if precision.type == "fp16" else reader.rows
            yield read(target, start, stop)


def _manifest(
    reader: WeightReader,
    spec: ModelSpec,
    options: ExportOptions,
    graphs: dict[str, GraphInfo],
    embedding: EmbeddingInfo,
    cache: CacheShape,
    has_tokenizer: bool,
) -> Manifest:
    """The manifest before verification, without file hashes and verdict."""
    manifest = Manifest(
        family=spec.family,
        target=options.target,
        provider="cuda" if is_tensorrt(options.target) else options.provider,
        context_tokens=spec.decoder.context_tokens,
        image=spec.image,
        templates=spec.templates,
        default_template=spec.default_template,
        tokens=spec.tokens,
        generation=spec.generation,
        cache=cache,
        graphs=graphs,
        embedding=embedding,
        has_tokenizer=has_tokenizer,
        precision={**reader.plan.parts, "kv": cache.dtype},
        group_sizes=reader.plan.group_sizes,
        requested_group=options.group,
        requested_precision=dict(options.precisions),
        kept_in_float=reader.plan.kept_in_float,
        memory_bytes={},
        files={},
        made_by=_provenance(reader),
        plugin=PluginUse(PACKING_VERSION) if options.is_routed else None,
    )
    return replace(manifest, format_version=format_of(manifest))


def _provenance(reader: WeightReader) -> Provenance:
    packages = ("torch", "onnx", "onnxruntime", "numpy", "safetensors", "tokenizers")
    versions = {"vlmdeploy": vlmdeploy.__version__, **{name: version(name) for name in packages}}
    notes = tuple(_quantization_notes(reader)) if reader.checkpoint.is_quantized else ()
    return Provenance(reader.checkpoint.fingerprint(), versions, _quantization(reader), notes)


def _quantization(reader: WeightReader) -> str:
    """How the bundle's codes were chosen."""
    if not reader.plan.is_quantized:
        return "none"
    return "gptq" if reader.checkpoint.is_quantized else "rtn"


def _rounded_floats(reader: WeightReader) -> Iterable[str]:
    """Name the parts that a quantized checkpoint holds as floats and the user wants as integers."""
    if reader.checkpoint.is_quantized:
        targets = [target for target, precision in reader.plan.by_target.items() if precision.bits]
        checkpoint = reader.checkpoint
        floats = {checkpoint.rules[target].part for target in targets if checkpoint.stored_grid(target) is None}
        parts = sorted(floats - {"embedding"})
        if parts:
            yield f"{', '.join(parts)}: held as floats by the checkpoint, rounded to nearest as asked"


def _quantization_notes(reader: WeightReader) -> Iterable[str]:
    """Notes for the user from the quantized checkpoint's codes and report."""
    yield from _rounded_floats(reader)
    targets = [target for target in reader.plan.by_target if reader.plan[target].bits == 3]
    if targets:
        yield f"{len(targets)} linears hold 3-bit codes in 4-bit fields: exact, with the size and speed of 4 bits"
    linears = reader.checkpoint.report().get("linears", [])
    negative = sum(linear["negative_scales"] > 0 for linear in linears)
    if negative:
        yield f"{negative} linears have scales below zero, which TensorRT does not take"
    rounded = [linear["name"] for linear in linears if linear["note"].startswith("uncalibr")]
    if rounded:
        yield f"{len(rounded)} linears are not calibrated, only rounded to nearest: {rounded[0]} and others"


def _memory_bytes(manifest: Manifest, files: dict[str, FileEntry]) -> dict[str, int]:
    """Weight bytes that each phase reads, and the cache's bytes per token."""
    graphs = {name: files[graph.file].bytes + files[graph.data_file].bytes for name, graph in manifest.graphs.items()}
    return {
        "vision": graphs["vision"],
        "prefill": sum(graphs.values()) - graphs["vision"],
        "decode": graphs[manifest.token_graph],
        "kv_per_token": manifest.cache.token_bytes,
    }


def _bundle_files(folder: Path) -> list[Path]:
    """Every file of the bundle except the manifest and our hidden marker."""
    return sorted(path for path in folder.iterdir() if path.name != MANIFEST_NAME and not path.name.startswith("."))
