"""Architectures of the benchmark cases, shared with the tests: random numbers everywhere, never a zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def randomise_(module: nn.Module, seed: int = 0, spread: float = 1.0) -> nn.Module:
    """Give every parameter and running statistic a random value: a zero bias or seed would hide an error.

    Matrices get spread / sqrt(fan in), vectors named weight (norms) 1 + noise, biases and the rest noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        for name, p in module.named_parameters():
            last = name.rpartition(".")[2]
            if last.startswith("weight") and p.dim() >= 2:
                p.copy_(spread * noise(p) / math.sqrt(max(1, p[0].numel())))
            elif last.startswith("weight"):
                p.copy_(1 + 0.3 * noise(p))
            elif last == "code_gain":
                p.copy_(0.7 + 0.2 * noise(p))
            else:
                p.copy_((0.3 if last.startswith("bias") else 1.0) * spread * noise(p))
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * noise(b))
            elif name.endswith("running_var"):
                b.copy_(0.5 + noise(b) ** 2)
    return module


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def inr(hidden: int = 32) -> nn.Sequential:
    """Make a network 1-hidden-hidden-1 with sine activations; 1,153 weights at 32."""
    return nn.Sequential(nn.Linear(1, hidden), Sine(), nn.Linear(hidden, hidden), Sine(), nn.Linear(hidden, 1))


def zoo_cnn() -> nn.Sequential:
    """Make the network of the small CNN zoo: four layers, 4,970 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def small_lenet() -> nn.Sequential:
    """Make a LeNet for 28 x 28 images with narrow dense layers: 22,262 weights, 15,420 in the largest layer."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 10),
    )  # fmt: skip


def square_mlp(weights: int) -> nn.Sequential:
    """Make a network of three square matrices, about ``weights`` numbers in all."""
    width = max(1, round(math.sqrt(weights / 3)))
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))


class ResidualBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class BottleneckBlock(nn.Module):
    EXPANSION = 4

    def __init__(self, n_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        n_out = self.EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + self.shortcut(x)).relu()


class BottleneckResNet(nn.Module):
    """ResNet-50 with its defaults: 25,557,032 parameters."""

    def __init__(
        self, widths: tuple[int, ...] = (64, 128, 256, 512), depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0])
        stages, n_in = [], widths[0]
        for k, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for b in range(depth):
                stages.append(BottleneckBlock(n_in, width, 2 if k and b == 0 else 1))
                n_in = BottleneckBlock.EXPANSION * width
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(n_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.bn(self.stem(x)).relu(), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], blocks: int, n_in: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(n_in, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages = []
        for k, width in enumerate(widths):
            for b in range(blocks):
                before = widths[max(0, k - 1)] if b == 0 else width
                stages.append(ResidualBlock(before, width, 2 if k and b == 0 else 1))
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.bn(self.stem(x)).relu()).mean((2, 3)))


class Transformer(nn.Module):
    """Embedding, a bare positional parameter, encoder layers with fused attention projections, head (tied or not)."""

    def __init__(self, vocabulary: int, width: int, heads: int, depth: int, length: int, tied: bool = False) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(length, width))
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def gpt2_state_dict(
    layers: int = 12, width: int = 768, vocabulary: int = 50257, length: int = 1024
) -> dict[str, Tensor]:
    """Make random tensors of the names and shapes of GPT-2 (124,439,808 weights with the defaults)."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, width), "wpe.weight": (length, width)}
    for n in range(layers):
        h = f"h.{n}."
        shapes |= {
            h + "ln_1.weight": (width,), h + "ln_1.bias": (width,),
            h + "attn.c_attn.weight": (width, 3 * width), h + "attn.c_attn.bias": (3 * width,),
            h + "attn.c_proj.weight": (width, width), h + "attn.c_proj.bias": (width,),
            h + "ln_2.weight": (width,), h + "ln_2.bias": (width,),
            h + "mlp.c_fc.weight": (width, 4 * width), h + "mlp.c_fc.bias": (4 * width,),
            h + "mlp.c_proj.weight": (4 * width, width), h + "mlp.c_proj.bias": (width,),
        }  # fmt: skip
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
