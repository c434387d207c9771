"""Maker of a zoo of implicit neural representations: SIRENs (Sitzmann et al. 2020, arXiv 2006.09661) of sine waves.

The task is section 4.1 of the SNE paper, after Navon et al. 2023 (arXiv 2301.12780): predict the frequency of the
sine from the weights of the network that was fitted to it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .making import Group, Made, groups_of, make_zoo
from .rebuilding import compare
from .sirens import OMEGA, Siren, fit_stacked, initial_weights, stacked_siren
from .table import Zoo

WIDTHS = (1, 32, 32, 1)
FREQUENCIES = (0.5, 10.0)
GROUP = 100
TEST_POINTS = 512


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
        init: initial weights, "siren" or "dwsnets", see `sirens.initial_weights`.
        on_step: called with the number of each step.

    Returns:
        Stacked tensors `(K, ...)`, names and order those of `Siren().state_dict()`.

    Raises:
        ValueError: an unknown `init`.
    """
    g = torch.Generator().manual_seed(seed)
    k = len(frequencies)
    params = initial_weights(k, WIDTHS, omega=omega, init=init, generator=g)
    width = 2 * math.pi / points
    starts = torch.arange(points) * width - math.pi

    def draw(step: int) -> tuple[Tensor, Tensor]:
        x = starts + width * torch.rand(k, points, generator=g)  # [K, points]
        return x[..., None], (frequencies[:, None] * x).sin()

    return fit_stacked(params, draw, steps=steps, lr=lr, omega=omega, on_step=on_step)


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
        >>> zoo = make_sine_zoo("sines", 3, steps=20)
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
            y = stacked_siren(stacked, x[..., None], omega)[..., 0]
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
