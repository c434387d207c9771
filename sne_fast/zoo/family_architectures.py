"""Architectures of the networks of `make_family_zoo`: random widths, depths, activations and norms of seven kinds."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .architectures import ACTIVATIONS, SmallViT, TransformerBlock
from .family_data import VOCABULARY, Task
from .sirens import Siren

Item = TypeVar("Item")

ARCHITECTURE_FAMILIES = {
    "mlp": ("tables", "images"),
    "cnn": ("images",),
    "resnet": ("images",),
    "vit": ("images",),
    "gpt": ("text",),
    "rnn": ("sequences",),
    "siren": ("functions",),
}
"""Family of architectures -> kinds of data that its networks are trained on."""
_LARGEST, _DEEPEST = 2048, 16
_SMOOTH = ("relu", "tanh", "gelu", "silu", "leakyrelu", "elu")


class Draws:
    """Random choices from one generator on the CPU."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def number(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def log_number(self, low: float, high: float) -> float:
        """Return a number in [low, high) whose logarithm is uniform."""
        return float(low * (high / low) ** self.number(0, 1))

    def choice(self, items: Sequence[Item]) -> Item:
        """Return one of the items."""
        return items[self.integer(0, len(items) - 1)]


def draw_architecture(family: str, task: Task, draws: Draws, scale: float = 1.0) -> str:
    """Draw an architecture that fits a task, as JSON text that :func:`build` reads.

    Args:
        family: one of `ARCHITECTURE_FAMILIES`.
        task: gives the shapes of inputs and outputs.
        draws: the source of randomness.
        scale: factor of all widths, for tests with small networks.
    """

    def width(low: float, high: float, multiple: int = 1) -> int:
        return max(1, round(scale * draws.log_number(low, high) / multiple)) * multiple

    about: dict[str, Any] = {"family": family, "outputs": task.outputs}
    if family == "mlp":
        about |= {"inputs": int(torch.tensor(task.shape).prod()), "activation": draws.choice(_SMOOTH)}
        about |= {"widths": [width(16, 128) for _ in range(draws.integer(1, 4))]}
        about |= {"norm": draws.choice(("", "", "layer", "batch"))}
    elif family == "cnn":
        about |= {"side": task.shape[-1], "activation": draws.choice(_SMOOTH), "kernel": draws.choice((3, 3, 5))}
        about |= {"widths": [width(6, 40) for _ in range(draws.integer(2, 4))]}
        about |= {"norm": draws.choice(("", "batch")), "head": draws.choice(("pool", "flatten"))}
    elif family == "resnet":
        about |= {"activation": draws.choice(_SMOOTH), "width": width(8, 28), "blocks": draws.integer(1, 3)}
        about |= {"norm": draws.choice(("batch", "group"))}
    elif family == "vit":
        about |= {"side": task.shape[-1], "width": width(16, 56, 8), "blocks": draws.integer(1, 4)}
        about |= {"heads": draws.choice((2, 4))}
    elif family == "gpt":
        about |= {"length": task.shape[-1], "width": width(16, 56, 8), "blocks": draws.integer(1, 4)}
        about |= {"heads": draws.choice((2, 4))}
    elif family == "rnn":
        about |= {"inputs": task.shape[-1], "cell": draws.choice(("rnn", "gru", "lstm")), "width": width(16, 64)}
        about |= {"layers": draws.integer(1, 2)}
    else:
        about |= {"inputs": task.shape[-1], "widths": [width(16, 64)] * draws.integer(2, 4)}
    return json.dumps(about, sort_keys=True)


def with_outputs(architecture: str, outputs: int) -> str:
    """Return the architecture with another number of outputs."""
    return json.dumps({**json.loads(architecture), "outputs": outputs}, sort_keys=True)


def build(architecture: str) -> nn.Module:
    """Return a fresh module of an architecture that `draw_architecture` described.

    Raises:
        ValueError: text of another form, or sizes far above those that are drawn.
    """
    try:
        about = json.loads(architecture)
        for value in about.values():
            if isinstance(value, int) and not 1 <= value <= _LARGEST:
                raise ValueError(f"build: sizes must lie in 1..{_LARGEST}, got {value} in {architecture!r:.80}")
        widths = about.get("widths", [1])
        if not 1 <= len(widths) <= _DEEPEST or not all(1 <= width <= _LARGEST for width in widths):
            raise ValueError(f"build: widths must be up to {_DEEPEST} numbers up to {_LARGEST}, got {widths!r:.80}")
        family = about.pop("family")
        return _BUILDERS[family](**about)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"build: must be an architecture of make_family_zoo, got {architecture!r:.80}") from error


def head_of(module: nn.Module) -> tuple[str, nn.Linear]:
    """Return the output layer, the last linear layer of any of these architectures, and its name."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1]


def _mlp(inputs: int, outputs: int, widths: Sequence[int], activation: str, norm: str) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for k, width in enumerate(widths):
        layers.append((f"fc{k}", nn.Linear(inputs, width)))
        if norm:
            layers.append((f"norm{k}", nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)))
        layers.append((f"activation{k}", ACTIVATIONS[activation]()))
        inputs = width
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(inputs, outputs))]))


def _cnn(
    side: int, outputs: int, widths: Sequence[int], activation: str, norm: str, kernel: int, head: str
) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = []
    before = 1
    for k, width in enumerate(widths):
        stride = 2 if side > 2 else 1
        layers.append((f"conv{k}", nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2)))
        if norm:
            layers.append((f"norm{k}", nn.BatchNorm2d(width)))
        layers.append((f"activation{k}", ACTIVATIONS[activation]()))
        before, side = width, -(-side // stride)
    if head == "pool":
        layers.append(("pool", nn.AdaptiveAvgPool2d(1)))
        side = 1
    layers += [("flatten", nn.Flatten()), ("head", nn.Linear(before * side * side, outputs))]
    return nn.Sequential(OrderedDict(layers))


def _norm(norm: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width)


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3 with norms, beside which the input passes."""

    def __init__(self, width: int, norm: str, activation: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(norm, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(norm, width)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the shape of `x`, `(n, width, height, width)`."""
        inner = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.activation(x + inner)


class SmallResNet(nn.Module):
    """Residual CNN for grey images, with a classifier on the mean over the map."""

    def __init__(self, outputs: int, width: int, blocks: int, norm: str, activation: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width, norm, activation) for _ in range(blocks)))
        self.head = nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(n, outputs)` of images `(n, 1, side, side)`."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class SmallGPT(nn.Module):
    """Transformer that predicts the next token."""

    def __init__(self, outputs: int, length: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(VOCABULARY, width)
        self.position_embed = nn.Embedding(length, width)
        for table in (self.token_embed, self.position_embed):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, 4 * width, causal=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits `(n, length, outputs)` of the tokens that follow `tokens`, `(n, length)` int64."""
        x = self.token_embed(tokens) + self.position_embed.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class SmallRNN(nn.Module):
    """Recurrent network with a linear layer on the last output."""

    def __init__(self, outputs: int, inputs: int, cell: str, width: int, layers: int) -> None:
        super().__init__()
        kind = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell]
        self.rnn = kind(inputs, width, layers, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs `(n, outputs)` of sequences `(n, length, inputs)`."""
        return self.head(self.rnn(x)[0][:, -1])


def _siren(inputs: int, outputs: int, widths: Sequence[int]) -> nn.Module:
    siren = Siren((inputs, *widths, outputs))
    layers = [layer for layer in siren if isinstance(layer, nn.Linear)]
    for k, layer in enumerate(layers):  # the initial weights of Sitzmann et al. 2020
        bound = 1 / layer.in_features if k == 0 else (6 / layer.in_features) ** 0.5 / siren.omega
        nn.init.uniform_(layer.weight, -bound, bound)
    return siren


def _vit(outputs: int, side: int, width: int, blocks: int, heads: int) -> nn.Module:
    return SmallViT(width, blocks, heads, side, outputs)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet": SmallResNet,
    "vit": _vit,
    "gpt": SmallGPT,
    "rnn": SmallRNN,
    "siren": _siren,
}
