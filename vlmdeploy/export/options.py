"""What a user may choose for an export, checked against the checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlmdeploy.errors import ExportError
from vlmdeploy.export.engines.build import BuildOptions
from vlmdeploy.quant.precision import DEFAULT_GROUP, is_tensorrt


@dataclass(frozen=True)
class ExportOptions:
    """What the command line offers; None means the target's or the checkpoint's default."""

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
    routed_plugin: Literal["on", "off", "auto"] = "auto"

    @property
    def is_routed(self) -> bool:
        """Whether the decoder becomes one routed graph. "auto" is the segment graphs: docs/plugin.md says why.

        Raises ExportError where the target's engines take no plugin.
        """
        if self.routed_plugin == "on" and not self.target.startswith("trt-"):
            why = "TensorRT-RTX takes no plugins" if self.target.startswith("rtx-") else "the plugin is TensorRT's"
            raise ExportError(f"--routed-plugin on: {self.target} cannot use it, {why}: export with --target trt-int4")
        return self.routed_plugin == "on"

    @property
    def cache_type(self) -> str:
        """What the KV cache is made of. Raises ExportError where another precision was asked for."""
        wanted = "fp16" if is_tensorrt(self.target) or self.provider == "cuda" else "fp32"
        if self.kv not in (None, wanted):
            raise ExportError(f"--kv is {self.kv}, but the cache of {self.target} on this provider is {wanted}")
        return wanted
