"""Modules that run the networks of a zoo, given their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from . import inrs, mnist_inrs
from .architectures import BY_SIDE
from .images import side_of
from .sirens import Siren
from .table import Zoo

STANDARDISED = math.sqrt(3)
"""Bound of the uniform distribution of standard deviation 1, that of the pixels of the data sets."""


@dataclass(frozen=True)
class Runnable:
    """One architecture, and the inputs it is made for.

    Args:
        make: returns a fresh module, in which the tensors of every network fit by their names.
        input_shape: of one input, `(coordinates,)` or `(1, height, width)`.
        bound: inputs lie roughly in [-bound, bound].
        classes: outputs are logits of classes.
    """

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    bound: float
    classes: bool

    def template(self) -> nn.Module:
        """Return a module without values, for `torch.func.functional_call`, in evaluation mode."""
        with torch.device("meta"):  # so that no random numbers are drawn
            return self.make().eval()


def runnable(zoos: Sequence[Zoo]) -> Runnable:
    """Return how the networks of some zoos are run.

    Args:
        zoos: of the makers of this package, all networks of one architecture and for images of one size.

    Raises:
        ValueError: zoos of other sources, or of several architectures.
    """
    kinds = {}
    for zoo in zoos:
        source = zoo.about.get("source")
        if source == "classifiers":
            side = side_of(str(zoo.about["dataset"]))
            for name in sorted({str(name) for name in zoo.column("architecture")}):
                made = Runnable(BY_SIDE[side][name], (1, side, side), STANDARDISED, True)
                kinds[f"{name} of {side} x {side} images"] = made
        elif source == "sine_inrs":
            omega = zoo.about["omega"]
            kinds[f"SIREN of sines, omega {omega}"] = Runnable(partial(Siren, inrs.WIDTHS, omega), (1,), math.pi, False)
        elif source == "mnist_inrs":
            omega = zoo.about["omega"]
            make = partial(Siren, mnist_inrs.WIDTHS, omega, mnist_inrs.OFFSET)
            kinds[f"SIREN of images, omega {omega}"] = Runnable(make, (2,), 1.0, False)
        else:
            raise ValueError(f"runnable: no way is known to run networks of source {source!r}")
    if len(kinds) != 1:
        raise ValueError(f"runnable: networks must be of one architecture, got {', '.join(kinds) or 'none'}")
    return next(iter(kinds.values()))
