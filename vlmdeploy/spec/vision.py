"""The vision encoder as data: the geometry of its transformer."""

from dataclasses import dataclass
from typing import Literal

ActivationName = Literal["gelu", "quick_gelu"]  # with erf; x * sigmoid(1.702 x)


@dataclass(frozen=True)
class VisionSpec:
    """A vision transformer with a class token, a learned position table and biases in every layer.

    num_layers: those whose output is used. norm_place: "branch": x + norm(f(x)); "before": x + f(norm(x)).
    embed_norm_eps: of a norm between positions and first layer; None without one.
    """

    image_px: int
    patch_px: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    activation: ActivationName = "gelu"
    norm_place: Literal["branch", "before"] = "branch"
    patch_bias: bool = True
    embed_norm_eps: float | None = None

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_px // self.patch_px

    @property
    def num_patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads
