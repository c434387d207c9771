"""Makers of zoos of implicit neural representations: SIRENs (Sitzmann et al. 2020, arXiv 2006.09661) of sine waves.

The task is section 4.1 of the SNE paper, after Navon et al. 2023 (arXiv 2301.12780): predict the frequency of the
sine from the weights of the network that was fitted to it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .making import Group, Made, groups_of, make_zoo
from .table import Zoo
from .verification import compare

OMEGA = 30.0
WIDTHS = (1, 32, 32, 1)
FREQUENCIES = (0.5, 10.0)
GROUP = 100
TEST_POINTS = 512


class Siren(nn.Sequential):
    """SIREN, linear layers with sines between them: `y = W_n sin(omega (... sin(omega (W_1 x + b_1)) ...)) + b_n`.

    Args:
        widths: those of input, hidden layers and output, such as `(1, 32, 32, 1)`.
        omega: factor inside every sine.
        offset: added to the output.

    Raises:
        ValueError: fewer than two widths.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, omega: float = OMEGA, offset: float = 0.0) -> None:
        if len(widths) < 2:
            raise ValueError(f"Siren: widths must be at least two, got {tuple(widths)}")
        super().__init__(*(nn.Linear(a, b) for a, b in pairwise(widths)))
        self.omega, self.offset = omega, offset

    def forward(self, x: Tensor) -> Tensor:
        """Return the values `(n, out)` at coordinates `(n, in)`."""
        *hidden, last = self
        for layer in hidden:
            x = (self.omega * layer(x)).sin()
        return last(x) + self.offset


def siren_of(state_dict: Mapping[str, Tensor], omega: float = OMEGA, offset: float = 0.0) -> Siren:
    """Return a Siren with the matrices and vectors of a state_dict, in their order, whatever their names.

    Raises:
        ValueError: tensors that are not a chain of linear layers.
    """
    tensors = [t.float() for t in state_dict.values() if t.is_floating_point() and t.ndim in (1, 2)]
    matrices, vectors = [t for t in tensors if t.ndim == 2], [t for t in tensors if t.ndim == 1]
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    widths = [matrices[0].shape[1], *(m.shape[0] for m in matrices)] if matrices else []
    fits = len(matrices) == len(vectors) and all(
        m.shape == (b, a) and v.shape == (b,)
        for m, v, a, b in zip(matrices, vectors, widths[:-1], widths[1:], strict=False)
    )
    if not matrices or not fits:
        raise ValueError(f"siren_of: the tensors must be a chain of linear layers with biases, got {shapes}")
    siren = Siren(widths, omega, offset)
    siren.load_state_dict(
        {f"{k}.{own}": t for k, pair in enumerate(zip(matrices, vectors, strict=True))
         for own, t in zip(("weight", "bias"), pair, strict=True)}
    )  # fmt: skip
    return siren


def fit_sines(
    frequencies: Tensor,
    *,
    seed: int,
    steps: int = 600,
    lr: float = 1e-3,
    points: int = 96,
    omega: float = OMEGA,
    init: str = "siren",
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Fit one SIREN 1-32-32-1 to `sin(a x)` on [-pi, pi] for each of K frequencies a, all at once.

    Adam minimises the mean squared error at one random point in each of `points` equal parts of the interval, drawn
    anew in every step; the learning rate falls to zero along a cosine.

    Args:
        frequencies: the frequencies a, `(K,)`.
        seed: of the initial weights and points.
        steps: number of steps.
        lr: initial learning rate.
        points: number of points in each step.
        omega: factor inside every sine.
        init: initial weights. "siren", of Sitzmann et al.: U(-1, 1) in the first layer, U(-b, b) in the others, with
            b = sqrt(6 / in) / omega. "dwsnets", of Navon et al.: U(-b, b) in all layers but the last, with zero biases.
        on_step: called with the number of each step.

    Returns:
        Stacked tensors `(K, ...)`, names and order those of `Siren().state_dict()`.

    Raises:
        ValueError: an unknown `init`.
    """
    if init not in ("siren", "dwsnets"):
        raise ValueError(f"fit_sines: init must be 'siren' or 'dwsnets', got {init!r}")
    g = torch.Generator().manual_seed(seed)
    k = len(frequencies)
    params: dict[str, Tensor] = {}
    for layer, (a, b) in enumerate(pairwise(WIDTHS)):
        first, last = layer == 0, layer == len(WIDTHS) - 2
        bound = 1 / a if first and init == "siren" else math.sqrt(6 / a) / omega
        default = 1 / math.sqrt(a)  # of nn.Linear, weights and biases
        if last and init == "dwsnets":
            bound = default
        params[f"{layer}.weight"] = bound * (2 * torch.rand(k, b, a, generator=g) - 1)
        params[f"{layer}.bias"] = default * (2 * torch.rand(k, b, generator=g) - 1)
        if init == "dwsnets" and not last:
            params[f"{layer}.bias"].zero_()
    leaves = [p.requires_grad_() for p in params.values()]
    optimiser = torch.optim.Adam(leaves, lr=lr, fused=True)
    width = 2 * math.pi / points
    starts = torch.arange(points) * width - math.pi
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = starts + width * torch.rand(k, points, generator=g)  # [K, points]
        y = _stacked_siren(params, x[..., None], omega)[..., 0]
        # A sum over networks, so that each gets the gradient of its own mean.
        loss = (y - (frequencies[:, None] * x).sin()).square().mean(1).sum()
        grads = torch.autograd.grad(loss, leaves)
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.contiguous()  # fused Adam ignores strides
        optimiser.step()
        if on_step is not None:
            on_step(step)
    return {name: p.detach() for name, p in params.items()}


def _stacked_siren(params: Mapping[str, Tensor], x: Tensor, omega: float) -> Tensor:
    layers = len(params) // 2
    for layer in range(layers):
        weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
        x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))  # [K, points, out]
        if layer < layers - 1:
            x = (omega * x).sin()
    return x


@torch.no_grad()
def sine_error(siren: nn.Module, frequency: float) -> float:
    """Return the mean squared error of a network against `sin(a x)` at 512 equally spaced points of [-pi, pi]."""
    x = torch.linspace(-math.pi, math.pi, TEST_POINTS)[:, None]
    return (siren(x) - (frequency * x).sin()).square().mean().item()


def make_sine_zoo(
    folder: str | PathLike[str],
    networks: int = 1000,
    *,
    seed: int = 0,
    steps: int = 600,
    lr: float = 1e-3,
    points: int = 96,
    omega: float = OMEGA,
    init: str = "siren",
    frequencies: tuple[float, float] = FREQUENCIES,
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Fit SIRENs 1-32-32-1 (1,153 weights) to sines of random frequency, write them to `folder` and return the zoo.

    Groups of 100 are fitted at once. After an interruption the same call makes the groups that are missing. The same
    arguments give the same zoo, interrupted or not.

    Args:
        folder: the folder of the files, made if missing; a finished zoo there is refused.
        networks: number of networks.
        seed: of the frequencies and of the fits.
        steps: as in `fit_sines`, like `lr`, `points`, `omega` and `init`.
        frequencies: bounds of the frequency a, which is uniform between them, in radians per unit of x.
        on_progress: called with the share done, in [0, 1].

    Returns:
        A zoo whose rows hold `a` (the target) and `mse` (against the sine, at 512 points).

    Raises:
        ValueError: fewer than one network, or frequencies that are not a range.
        FileExistsError: `folder` holds a zoo already.

    Example:
        >>> zoo = make_sine_zoo("sines", 10, steps=20)
        >>> verify(zoo) < 1e-3
        True
    """
    low, high = frequencies
    if networks < 1 or not 0 <= low <= high:
        raise ValueError(f"make_sine_zoo: needs networks >= 1 and 0 <= low <= high, got {networks} and {frequencies}")
    groups = groups_of("siren", networks, GROUP, 0, 1.0)

    def work(group: Group, on_share: Callable[[float], None]) -> Made:
        group_seed = zlib.crc32(f"{seed}/sine/{group.name}".encode())
        g = torch.Generator().manual_seed(group_seed)
        a = low + (high - low) * torch.rand(group.size, generator=g)
        stacked = fit_sines(
            a, seed=group_seed + 1, steps=steps, lr=lr, points=points, omega=omega, init=init,
            on_step=lambda step: on_share((step + 1) / steps),
        )  # fmt: skip
        x = torch.linspace(-math.pi, math.pi, TEST_POINTS).expand(group.size, -1)
        with torch.no_grad():
            y = _stacked_siren(stacked, x[..., None], omega)[..., 0]
        error = (y - (a[:, None] * x).sin()).square().mean(1)
        rows = [
            (
                f"siren-{group.first + i:04d}",
                {"architecture": "siren-32-32", "a": a[i].item(), "mse": error[i].item()},
            )
            for i in range(group.size)
        ]
        return stacked, rows

    about = {
        "source": "sine_inrs", "networks": networks, "seed": seed, "steps": steps, "lr": lr, "points": points,
        "omega": omega, "init": init, "frequencies": [low, high], "targets": ["a"], "hyperparameters": [],
    }  # fmt: skip
    return make_zoo(folder, groups, work, about, on_progress)


def verify(zoo: Zoo, networks: Sequence[int]) -> list[tuple[float, str]]:
    """Compare the mean squared error of each network against the sine of its label `a` with the column `mse`."""

    def measure(module: nn.Module, row: Mapping[str, Any]) -> float:
        return sine_error(module, row["a"])

    return compare(zoo, networks, build=lambda row: Siren(omega=zoo.about["omega"]), measure=measure, column="mse")
