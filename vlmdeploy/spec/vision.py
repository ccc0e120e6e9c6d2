"""The vision encoder as data: the geometry of its transformer."""

from dataclasses import dataclass
from typing import Literal

ActivationName = Literal["gelu"]  # "gelu" is the exact one (erf)


@dataclass(frozen=True)
class VisionSpec:
    """A vision transformer with a class token, a learned position table, biases everywhere, norms on branch outputs."""

    image_px: int
    patch_px: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    activation: ActivationName = "gelu"

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
