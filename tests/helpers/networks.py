"""Case factory shared by tests and benchmarks: networks of every supported sort, with no parameter left at zero.

`make(name, seed, dtype)` gives one; `SMALL` are small enough for brute force, `MIXED` are the architectures that one
batch must be able to hold, `LARGE` are for benchmarks only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sne_fast.benchmark.networks import ResNet, Transformer, inr, randomise_, zoo_cnn

# ---------------------------------------------------------------------------------------------------------------------
# Small networks


def mlp(*widths: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        modules += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, (2, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2)
        self.cell = nn.GRUCell(2, 2)
        self.out = nn.Linear(2, 2)


class Scale(nn.Module):
    """A layer of a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))


def one_scalar() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), Scale(), nn.Linear(3, 1, bias=False))


class Oddities(nn.Module):
    """Every supported kind, every way a tensor can be stored, and everything that must be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(2, 3, 2, 2, 2))  # owned by the root: the first layer
        self.register_buffer("constant", torch.randn(4))  # not a running statistic: left out
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))  # stored as two real parts
        self.conv1 = nn.Conv1d(2, 3, 4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.conv3 = nn.Conv3d(1, 2, (1, 2, 3))
        self.up = nn.ConvTranspose2d(2, 3, (2, 3))
        self.activation = nn.PReLU(3)
        self.instance = nn.InstanceNorm1d(3, affine=False, track_running_stats=True)
        self.batch = nn.BatchNorm1d(5, affine=False)
        self.plain_batch = nn.BatchNorm1d(2, track_running_stats=False)
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(3)
        self.table = nn.EmbeddingBag(4, 3)
        self.gru = nn.GRU(2, 2, bias=False)
        self.dropout = nn.Dropout()
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.again = self.frozen  # the same module under a second name
        self.transposed = nn.Linear(3, 4)
        self.transposed.weight = nn.Parameter(torch.randn(3, 4).t())  # not contiguous
        self.tied = nn.Linear(3, 4, bias=False)
        self.tied.weight = self.transposed.weight  # a layer that vanishes: its only tensor stands elsewhere
        self.last_channels = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.last = nn.Linear(1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Networks of the experiments


def lenet() -> nn.Sequential:
    """Make LeNet-5, 61,706 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def sine_networks(count: int, hidden: int = 32, steps: int = 200, seed: int = 0) -> list[nn.Sequential]:
    """Fit `count` INRs, each to its own `amplitude * sin(frequency x)` (all at once, by stacked products).

    Each starts from weights of its own spread, as networks of a zoo with random hyperparameters do.
    """
    g = torch.Generator().manual_seed(seed)
    frequency = 1 + 5 * torch.rand(count, 1, 1, generator=g)
    amplitude = 0.5 + torch.rand(count, 1, 1, generator=g)
    x = torch.linspace(-math.pi, math.pi, 64).reshape(1, 64, 1).expand(count, 64, 1)
    y = amplitude * (frequency * x).sin()

    gain = 0.5 * 4 ** torch.rand(count, 1, 1, generator=g)

    def uniform(*shape: int, bound: float) -> Tensor:
        return (gain * bound * (2 * torch.rand(count, *shape, generator=g) - 1)).requires_grad_()

    b = math.sqrt(6 / hidden)
    weights = [uniform(1, hidden, bound=3.0), uniform(hidden, hidden, bound=b), uniform(hidden, 1, bound=b)]
    biases = [uniform(1, hidden, bound=1.0), uniform(1, hidden, bound=0.3), uniform(1, 1, bound=0.3)]
    optimiser = torch.optim.Adam(weights + biases, lr=3e-3)
    for _ in range(steps):
        out = torch.baddbmm(biases[0], x, weights[0]).sin()
        out = torch.baddbmm(biases[1], out, weights[1]).sin()
        loss = (torch.baddbmm(biases[2], out, weights[2]) - y).square().mean((1, 2)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    networks = []
    for n in range(count):
        network = inr(hidden)
        with torch.no_grad():
            for k, (w, c) in enumerate(zip(weights, biases, strict=True)):
                network[2 * k].weight.copy_(w[n].T)  # type: ignore[operator]
                network[2 * k].bias.copy_(c[n, 0])  # type: ignore[operator]
        networks.append(network)
    return networks


# ---------------------------------------------------------------------------------------------------------------------
# Large ones, for benchmarks


def resnet18() -> ResNet:
    return ResNet((64, 128, 256, 512), 2)


def vit_tiny() -> Transformer:
    return Transformer(1000, 192, 3, 12, 197)


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(5, 7, 6, 3),
    "mlp_tiny": lambda: mlp(2, 3, 1),
    "mlp_deep": lambda: mlp(3, *[4] * 11, 2),
    "cnn": cnn,
    "resnet_block": lambda: ResNet((2, 3), 1, n_in=1, classes=2),
    "transformer": lambda: Transformer(5, 4, 2, 1, 3),
    "transformer_tied": lambda: Transformer(5, 4, 2, 1, 3, tied=True),
    "recurrent": Recurrent,
    "one_scalar": one_scalar,
    "oddities": Oddities,
    "inr": inr,
    "zoo_cnn": zoo_cnn,
    "lenet": lenet,
    "resnet18": resnet18,
    "vit_tiny": vit_tiny,
}
MIXED = ["mlp", "cnn", "resnet_block", "transformer", "recurrent", "one_scalar"]
SMALL = [*MIXED, "mlp_tiny", "mlp_deep", "transformer_tied", "oddities"]
LARGE = ["resnet18", "vit_tiny"]


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make the named network with random parameters; a seed gives the same numbers in every dtype but for rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FACTORIES[name]()
    for p in network.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
        elif p.is_complex() and dtype == torch.float64:
            p.data = p.data.to(torch.complex128)
    for module in network.modules():
        for key, b in module._buffers.items():
            if b is not None and b.is_floating_point():
                module._buffers[key] = b.to(dtype)
    return randomise_(network, seed)


def num_weights(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
