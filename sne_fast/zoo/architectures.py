"""Architectures of the zoos made here: MLPs, CNNs and a transformer for small grey images with ten classes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .images import CLASSES, MNIST_SIDE, SIDE


def _mlp(*widths: int, norm: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        before = SIDE * SIDE
        for width in widths:
            layers += [nn.Linear(before, width), *([nn.LayerNorm(width)] if norm else []), nn.ReLU()]
            before = width
        return nn.Sequential(*layers, nn.Linear(before, CLASSES))

    return make


def _cnn(*widths: int, kernel: int, head: str, norm: str = "") -> Callable[[], nn.Module]:
    """Return a constructor of convolutions, of stride 2 until the map is 2 x 2; `head` is "flatten" or "pool"."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        before, side = 1, SIDE
        for width in widths:
            stride = 2 if side > 2 else 1
            layers.append(nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(width))
            elif norm == "group":
                layers.append(nn.GroupNorm(2, width))
            layers.append(nn.ReLU())
            before, side = width, side // stride
        if head == "pool":
            layers.append(nn.AdaptiveAvgPool2d(1))
        layers.append(nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(before * (1 if head == "pool" else side * side), CLASSES))

    return make


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "selu": nn.SELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leakyrelu": nn.LeakyReLU,
}
"""Name, as published zoos have it -> activation."""


def unterthiner_cnn(activation: str = "relu", padding: int = 0, channels: int = 1) -> nn.Module:
    """Return the network of Unterthiner et al. 2020 (arXiv 2002.11448), with 4,970 parameters for grey images.

    It has three convolutions of 16 filters of 3 x 3 with stride 2, each followed by the activation, then the mean over
    the map and a dense layer to ten classes.

    Args:
        activation: a key of `ACTIVATIONS`.
        padding: of the convolutions; the original has none and needs images of at least 15 x 15, 8 x 8 images need 1.
        channels: of the images.

    Raises:
        ValueError: an unknown activation.

    Example:
        >>> sum(p.numel() for p in unterthiner_cnn().parameters())
        4970
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unterthiner_cnn: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    layers: list[tuple[str, nn.Module]] = []
    for k in range(3):
        layers.append((f"conv{k}", nn.Conv2d(channels if k == 0 else 16, 16, 3, stride=2, padding=padding)))
        layers.append((f"activation{k}", ACTIVATIONS[activation]()))
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("dense", nn.Linear(16, CLASSES))]
    return nn.Sequential(OrderedDict(layers))


def _cnn_wide_kernels() -> nn.Module:
    """Return two convolutions of 5 x 5 and two dense layers on the flattened map."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(6, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 20),
        nn.ReLU(),
        nn.Linear(20, CLASSES),
    )


def _cnn_maxpool() -> nn.Module:
    """Return two convolutions of 3 x 3 without stride, each followed by a maximum over 2 x 2."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused projection; `causal` hides later tokens."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed tokens `(n, tokens, width)` of tokens of the same shape."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5  # [n, heads, tokens, tokens]
        if self.causal:
            logits = logits + torch.full((tokens, tokens), -math.inf).triu(1)
        weights = logits.softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, width))


class TransformerBlock(nn.Module):
    """Block of a transformer with its norms before attention and feed-forward part."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens `(n, tokens, width)` behind the block."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class SmallViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) for small images, with a classifier on the mean of patches.

    Patches are of 2 x 2 pixels.

    Args:
        width: of a token.
        depth: number of blocks.
        heads: of the attention.
        side: height and width of the images, even.
        outputs: number of classes.
    """

    def __init__(
        self, width: int = 16, depth: int = 2, heads: int = 2, side: int = SIDE, outputs: int = CLASSES
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position_embed = nn.Embedding((side // 2) ** 2, width)
        nn.init.normal_(self.position_embed.weight, std=0.1)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, 2 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(n, outputs)` of images `(n, 1, side, side)`."""
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position_embed.weight  # [n, patches, width]
        return self.head(self.norm(self.blocks(tokens)).mean(1))


FAMILIES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "mlp": {
        "mlp-10": _mlp(10),
        "mlp-10-10": _mlp(10, 10),
        "mlp-10-8-8": _mlp(10, 8, 8),
        "mlp-10-10-layernorm": _mlp(10, 10, norm=True),
        "mlp-32-16": _mlp(32, 16),
    },
    "cnn": {
        "cnn3-flatten": _cnn(6, 8, kernel=3, head="flatten"),
        "cnn3-pool-groupnorm": _cnn(6, 10, kernel=3, head="pool", norm="group"),
        "cnn3-pool-batchnorm": _cnn(4, 8, 6, kernel=3, head="pool", norm="batch"),
        "cnn5-flatten": _cnn(4, 4, kernel=5, head="flatten"),
        "cnn5-pool": _cnn(4, 6, kernel=5, head="pool"),
        "unterthiner": lambda: unterthiner_cnn(padding=1),
        "cnn5-dense": _cnn_wide_kernels,
        "cnn3-maxpool": _cnn_maxpool,
    },
    "vit": {"vit": SmallViT},
}
"""Family -> name -> constructor of a fresh module; images are `(n, 1, 8, 8)`, logits `(n, 10)`."""

ARCHITECTURES = {name: make for family in FAMILIES.values() for name, make in family.items()}
"""Name -> constructor, of all families."""

BY_SIDE: dict[int, dict[str, Callable[[], nn.Module]]] = {
    SIDE: ARCHITECTURES,
    MNIST_SIDE: {"unterthiner": unterthiner_cnn},
}
"""Height and width of the images -> name -> constructor of what fits them; weights of a name have the same shapes."""

FAMILY_OF = {name: family for family, members in FAMILIES.items() for name in members}
"""Name -> family."""
