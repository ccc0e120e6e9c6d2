"""What a user may choose for an export."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlmdeploy.errors import ExportError
from vlmdeploy.export.engines.build import BuildOptions
from vlmdeploy.kernels import cpu
from vlmdeploy.manifest import Resize, cache_types, dialect_of
from vlmdeploy.quant.precision import DEFAULT_GROUP


@dataclass(frozen=True)
class ExportOptions:
    """The options of the command line; None means the target's or the checkpoint's default."""

    target: str
    precisions: dict[str, str] = field(default_factory=dict)  # part -> precision
    group: int = DEFAULT_GROUP
    context_tokens: int | None = None
    tokenizer: Path | None = None
    default_template: str | None = None
    provider: Literal["cpu", "cuda"] = "cpu"
    force: bool = False
    seed: int = 0
    threads: int | None = None
    build: BuildOptions = field(default_factory=BuildOptions)
    kv: str | None = None
    image_recipe: Resize | None = None
    follow_links: bool = False  # of the checkpoint and the tokenizer's folder

    @property
    def is_routed(self) -> bool:
        """Whether to write one routed decoder graph. "auto" writes segment graphs: docs/plugin.md says why.

        Raises ExportError if the target's engines take no plugin.
        """
        is_routed = self.build.routed_plugin == "on"
        if is_routed and not self.target.startswith("trt-"):
            why = "TensorRT-RTX takes no plugins" if self.target.startswith("rtx-") else "the plugin is TensorRT's"
            raise ExportError(f"--routed-plugin on: {self.target} cannot use it, {why}: export with --target trt-int4")
        return is_routed

    @property
    def cache_type(self) -> str:
        """Type of the KV cache. Raises ExportError if the target or this installation cannot have the chosen one."""
        types = cache_types(dialect_of(self.target), self.provider)
        wanted = self.kv or types[0]
        if wanted not in types:
            raise ExportError(
                f"--kv is {wanted}, but the cache of {self.target} on this provider is {' or '.join(types)}"
            )
        if wanted != types[0] and not cpu.library():
            raise ExportError(f"--kv {wanted}: {cpu.MISSING}")
        return wanted
