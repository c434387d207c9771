"""The check that precedes every measurement: an engine's output and gradients against the float64 reference."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .._dispatch import use_backend
from ..batch import WeightBatch
from ..encoder import SNE
from .cases import Case

OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
AGREEMENT_TOLERANCE = 1e-4
# A gradient that is zero in exact arithmetic (keys' biases) is judged by the size of the largest one.
GRADIENT_FLOOR = 1e-3


class CheckFailed(RuntimeError):
    """The engine's numbers are wrong, so its speed is not reported."""


@dataclass(frozen=True)
class Check:
    """Relative errors of one case on `weights` weights: of z by its largest number, of each gradient by its norm."""

    weights: int
    output_error: float
    gradient_error: float
    worst_gradient: str
    backend: str

    @property
    def passed(self) -> bool:
        # Written so that NaN does not pass.
        return self.output_error <= OUTPUT_TOLERANCE and self.gradient_error <= GRADIENT_TOLERANCE


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max())


def _encode(encoder: SNE, batch: WeightBatch, direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    batch.values.requires_grad_()
    encoder.zero_grad()
    z = encoder(batch)
    (z * direction.to(z)).sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert batch.values.grad is not None
    return z.detach(), {**gradients, "values": batch.values.grad}


def run_check(case: Case, backend: str = "auto", size: str = "check") -> Check:
    """Encode a version of the case of at most 1e5 weights on `backend` and, in float64, on the reference.

    Raises:
        CheckFailed: z is off by more than 2e-5 or a gradient by more than 1e-4.
    """
    encoder = case.encoder()
    batch = case.batch(encoder, size)
    exact = copy.deepcopy(encoder).double()
    direction = torch.randn(len(batch), 64, generator=torch.Generator().manual_seed(2))
    with use_backend("reference"):
        expected_z, expected = _encode(exact, batch.to(dtype=torch.float64), direction)
    with use_backend(backend):
        z, gradients = _encode(encoder, batch, direction)

    floor = GRADIENT_FLOOR * max(float(g.norm()) for g in expected.values())
    errors = {
        name: float((gradients[name].double() - g).norm() / g.norm().clamp(min=floor)) if name in gradients else 1.0
        for name, g in expected.items()
    }
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst
    check = Check(batch.num_weights, relative_error(z, expected_z), errors[worst], worst, backend)
    if not check.passed:
        raise CheckFailed(
            f"{case.name}: backend {backend!r} is off on {check.weights:,} weights: output by {check.output_error:.1e} "
            f"(allowed {OUTPUT_TOLERANCE:.0e}), gradient of {worst} by {check.gradient_error:.1e} "
            f"(allowed {GRADIENT_TOLERANCE:.0e}); its speed is not reported"
        )
    return check


def check_agreement(case: Case, name: str, z: Tensor, expected: Tensor) -> float:
    """The full case, two contenders in float32: guards against errors that only show at size.

    Raises:
        CheckFailed: they differ by more than 1e-4, or are not finite.
    """
    error = relative_error(z, expected)
    if not error <= AGREEMENT_TOLERANCE:
        raise CheckFailed(f"{case.name}: engine and {name} differ by {error:.1e} on the full case; nothing is reported")
    return error
