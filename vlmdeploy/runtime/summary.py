"""A short description of a bundle."""

from vlmdeploy.byte_sizes import megabytes
from vlmdeploy.manifest import Manifest


def bundle_rows(manifest: Manifest) -> list[list[str]]:
    """Rows of label and value."""
    parts = ", ".join(f"{part} {precision}" for part, precision in manifest.precision.items())
    groups = ", ".join(f"{part} {size}" for part, size in manifest.group_sizes.items() if size)
    memory = ", ".join(f"{phase} {megabytes(size)}" for phase, size in manifest.memory_bytes.items())
    templates = ", ".join(template.name for template in manifest.templates)
    rows = [
        ["family", manifest.family],
        ["target", f"{manifest.target}, provider {manifest.provider}"],
        ["precision", parts],
        ["group sizes", groups or "none"],
        ["context", f"{manifest.context_tokens} tokens, {manifest.tokens.rows_per_image} of them for an image"],
        ["templates", f"{templates}; default {manifest.default_template}"],
        ["tokenizer", "yes" if manifest.has_tokenizer else "no: the bundle takes ids only"],
        ["size on disk", megabytes(sum(entry.bytes for entry in manifest.files.values()))],
        ["weights in memory", memory],
        ["verified", _verdict(manifest)],
    ]
    if manifest.plugin is not None:
        held = manifest.plugin.library or ("in the engine" if manifest.engines else "not built yet")
        rows.append(["routed plugin", f"one decoder for batches of prompts; {held}"])
    if manifest.kept_in_float:
        rows.append(["kept in float", f"{len(manifest.kept_in_float)} linears, first {manifest.kept_in_float[0]}"])
    return rows


ENGINE_COLUMNS = ["engine", "layers", "size", "for", "rows of one call"]


def engine_rows(manifest: Manifest) -> list[list[str]]:
    """One row per compiled engine."""
    rows = []
    for name, engine in manifest.engines.items():
        first, last = engine.layers
        gpus = ", ".join(f"SM {capability}" for capability in engine.compute_capabilities) or "portable"
        made_for = f"{engine.library} {engine.version}, {gpus}"
        layers = f"{first}..{last - 1}" if last else ""
        size = megabytes(manifest.files[engine.file].bytes)
        rows.append([name, layers, size, made_for, str(engine.chunk_rows) if last else ""])
    return rows


def _verdict(manifest: Manifest) -> str:
    verification = manifest.verification
    if verification is None:
        return "no"
    worst = max(verification.stages, key=lambda stage: stage.max_error / stage.tolerance)
    checks = f"{len(verification.stages)} comparisons with PyTorch on {verification.host}"
    tightest = f"tightest {worst.stage} ({worst.check}): {worst.max_error:.1e} of {worst.tolerance:.0e}"
    return f"{'yes' if verification.passed else 'FAILED'}: {checks}; {tightest}"
