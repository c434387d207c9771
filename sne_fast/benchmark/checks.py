"""The check that precedes every measurement: a backend's output and gradients against the float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..nn.encoder import SNE
from ..nn.padded import PaddedSNE
from ..ops.dispatch import use_backend
from .cases import Case

OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
AGREEMENT_TOLERANCE = 1e-4
# A gradient that is zero in exact arithmetic (keys' biases) is judged by the size of the largest one.
GRADIENT_FLOOR = 1e-3
# In half types and tf32 a backend may lose this many times what PyTorch's own padded form loses in the same type.
LOSS_RATIO = 2.0


class CheckFailed(RuntimeError):
    """The backend's numbers are wrong, so its speed is not reported."""


@dataclass(frozen=True)
class Check:
    """Relative errors of one case on `weights` weights: of z by its largest number, of each gradient by its norm."""

    weights: int
    output_error: float
    gradient_error: float
    worst_gradient: str
    backend: str
    output_allowed: float = OUTPUT_TOLERANCE
    gradient_allowed: float = GRADIENT_TOLERANCE

    @property
    def passed(self) -> bool:
        """True if both errors are within what is allowed."""
        # Written so that NaN does not pass.
        return self.output_error <= self.output_allowed and self.gradient_error <= self.gradient_allowed


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest magnitude."""
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max())


def _encode(
    encoder: SNE,
    batch: WeightBatch,
    direction: Tensor,
    autocast: torch.dtype | None = None,
    form: Callable[[WeightBatch], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return z and all gradients, by the encoder or by another `form` of it with the same parameters."""
    batch.values.requires_grad_()
    batch.values.grad = None
    encoder.zero_grad()
    with nullcontext() if autocast is None else torch.autocast(batch.values.device.type, dtype=autocast):
        z = (form or encoder)(batch)
    (z * direction.to(z)).sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert batch.values.grad is not None
    return z.detach(), {**gradients, "values": batch.values.grad}


def _worst(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """Return the name of the gradient that is off most, and by how much of its norm."""
    floor = GRADIENT_FLOOR * max(float(g.norm()) for g in expected.values())
    errors = {
        name: float((gradients[name].double() - g).norm() / g.norm().clamp(min=floor)) if name in gradients else 1.0
        for name, g in expected.items()
    }
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst
    return worst, errors[worst]


def run_check(
    case: Case,
    backend: str = "auto",
    size: str = "check",
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> Check:
    """Encode a version of the case of at most 1e5 weights on `backend` and, in float64, on the reference.

    Under `autocast`, and where torch's float32 products on a GPU are tf32, the padded form in plain PyTorch says how
    much precision the type costs, and the backend may lose `LOSS_RATIO` times that.

    Raises:
        CheckFailed: z is off by more than 2e-5 or a gradient by more than 1e-4 (or what is said above).
    """
    device = torch.device(device)
    encoder = case.encoder().to(device)
    batch = case.batch(encoder, size).to(device)
    exact = copy.deepcopy(encoder).double()
    direction = torch.randn(len(batch), 64, generator=torch.Generator().manual_seed(2)).to(device)
    with use_backend("reference"):
        expected_z, expected = _encode(exact, batch.to(dtype=torch.float64), direction)
    allowed = OUTPUT_TOLERANCE, GRADIENT_TOLERANCE
    if autocast is not None or (device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"):
        z, gradients = _encode(encoder, batch, direction, autocast, PaddedSNE(encoder))
        lost = relative_error(z, expected_z), _worst(gradients, expected)[1]
        allowed = max(allowed[0], LOSS_RATIO * lost[0]), max(allowed[1], LOSS_RATIO * lost[1])
    with use_backend(backend):
        z, gradients = _encode(encoder, batch, direction, autocast)

    worst, error = _worst(gradients, expected)
    check = Check(batch.num_weights, relative_error(z, expected_z), error, worst, backend, *allowed)
    if not check.passed:
        raise CheckFailed(
            f"{case.name}: backend {backend!r} is off on {check.weights:,} weights: output by {check.output_error:.1e} "
            f"(allowed {allowed[0]:.0e}), gradient of {worst} by {check.gradient_error:.1e} "
            f"(allowed {allowed[1]:.0e}); its speed is not reported"
        )
    return check


def check_agreement(
    case: Case, name: str, z: Tensor, expected: Tensor, tolerance: float = AGREEMENT_TOLERANCE
) -> float:
    """Compare two contenders in the same type on the full case, for errors that only show at size.

    Raises:
        CheckFailed: they differ by more than the tolerance (1e-4 in float32), or are not finite.
    """
    error = relative_error(z, expected)
    if not error <= tolerance:
        raise CheckFailed(
            f"{case.name}: backend and {name} differ by {error:.1e} on the full case; nothing is reported"
        )
    return error
