"""The vision encoder: a transformer over image patches, whose norms stand before its branches or behind them.

Source: EVA2-CLIP-E as CogVLM's authors use it (63 of 64 layers, no final norm), docs/families/cogvlm.md; CLIP's ViT.
"""

import torch
from torch import Tensor, nn

from vlmdeploy.model.products import Attention, Elementwise, WithoutFirst
from vlmdeploy.spec.vision import VisionSpec


class VisionLayer(nn.Module):
    """Attention of every token to all, then an MLP: x + norm(f(x)), or x + f(norm(x)) if norms come first."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.norms_first = spec.norm_place == "before"
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.attention = Attention(spec.num_heads, spec.head_dim)
        self.dense = nn.Linear(spec.width, spec.width)
        self.attention_norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.activation = Elementwise(spec.activation)
        self.fc2 = nn.Linear(spec.mlp_width, spec.width)
        self.mlp_norm = nn.LayerNorm(spec.width, spec.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[images, 1 + patches, width] -> the same shape."""
        if self.norms_first:
            x = x + self.dense(self.attention(self.qkv(self.attention_norm(x))))
            return x + self.fc2(self.activation(self.fc1(self.mlp_norm(x))))
        x = x + self.attention_norm(self.dense(self.attention(self.qkv(x))))
        return x + self.mlp_norm(self.fc2(self.activation(self.fc1(x))))


class VisionEncoder(nn.Module):
    """Pixels to patch features."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patch = nn.Conv2d(3, spec.width, spec.patch_px, spec.patch_px, bias=spec.patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(spec.width))
        self.positions = nn.Parameter(torch.empty(spec.num_patches + 1, spec.width))
        eps = spec.embed_norm_eps
        self.embed_norm = nn.Identity() if eps is None else nn.LayerNorm(spec.width, eps)
        self.layers = nn.ModuleList(VisionLayer(spec) for _ in range(spec.num_layers))
        self.patches = WithoutFirst()

    def embed(self, images: Tensor) -> Tensor:
        """The first layer's input, class token first: [images, 3, S, S] -> [images, 1 + patches, width]."""
        patches = self.patch(images).flatten(2).transpose(1, 2)  # row by row over the grid
        class_token = self.class_embedding.expand(len(images), 1, -1)
        embedded: Tensor = self.embed_norm(torch.cat((class_token, patches), 1) + self.positions)
        return embedded

    def forward(self, images: Tensor) -> Tensor:
        """Pixels [images, 3, S, S] -> features without the class token [images, patches, width]."""
        x = self.embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.patches(x)
