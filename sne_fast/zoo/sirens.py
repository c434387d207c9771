"""SIRENs (Sitzmann et al. 2020, arXiv 2006.09661): the module, initial weights, and fitting of many of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

OMEGA = 30.0


class Siren(nn.Sequential):
    """SIREN, linear layers with sines between them: `y = W_n sin(omega (... sin(omega (W_1 x + b_1)) ...)) + b_n`.

    Args:
        widths: those of input, hidden layers and output, such as `(1, 32, 32, 1)`.
        omega: factor inside every sine.
        offset: added to the output.

    Raises:
        ValueError: fewer than two widths.
    """

    def __init__(self, widths: Sequence[int] = (1, 32, 32, 1), omega: float = OMEGA, offset: float = 0.0) -> None:
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


def initial_weights(
    networks: int, widths: Sequence[int], *, omega: float, init: str, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw the initial weights of K SIRENs.

    Args:
        networks: their number K.
        widths: those of input, hidden layers and output.
        omega: factor inside every sine.
        init: "siren", of Sitzmann et al.: U(-1 / in, 1 / in) in the first layer, U(-b, b) in the others, with
            b = sqrt(6 / in) / omega. "dwsnets", of Navon et al.: U(-b, b) in all layers but the last, with zero biases.
        generator: of the draws.

    Returns:
        Stacked tensors `(K, ...)`, names and order those of `Siren(widths).state_dict()`.

    Raises:
        ValueError: an unknown `init`.
    """
    if init not in ("siren", "dwsnets"):
        raise ValueError(f"initial_weights: init must be 'siren' or 'dwsnets', got {init!r}")
    params: dict[str, Tensor] = {}
    for layer, (a, b) in enumerate(pairwise(widths)):
        first, last = layer == 0, layer == len(widths) - 2
        bound = 1 / a if first and init == "siren" else math.sqrt(6 / a) / omega
        default = 1 / math.sqrt(a)  # of nn.Linear, weights and biases
        if last and init == "dwsnets":
            bound = default
        params[f"{layer}.weight"] = bound * (2 * torch.rand(networks, b, a, generator=generator) - 1)
        params[f"{layer}.bias"] = default * (2 * torch.rand(networks, b, generator=generator) - 1)
        if init == "dwsnets" and not last:
            params[f"{layer}.bias"].zero_()
    return params


def fit_stacked(
    params: Mapping[str, Tensor],
    points: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    omega: float,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Fit K SIRENs with one output to values at points, each its own, all at once.

    Adam minimises the mean squared error at the points of each step; the learning rate falls to zero along a cosine.

    Args:
        params: stacked initial weights `(K, ...)`, as of `initial_weights`.
        points: returns the coordinates `(K, n, in)` and the wanted values `(K, n)` of the step of a number.
        steps: number of steps.
        lr: initial learning rate.
        omega: factor inside every sine.
        on_step: called with the number of each step.

    Returns:
        The fitted tensors, with the names and in the order of `params`.
    """
    leaves = [p.requires_grad_() for p in params.values()]
    optimiser = torch.optim.Adam(leaves, lr=lr, fused=True)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, wanted = points(step)
        y = stacked_siren(params, x, omega)[..., 0]
        # A sum over networks, so that each gets the gradient of its own mean.
        loss = (y - wanted).square().mean(1).sum()
        grads = torch.autograd.grad(loss, leaves)
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.contiguous()  # fused Adam ignores strides
        optimiser.step()
        if on_step is not None:
            on_step(step)
    return {name: p.detach() for name, p in params.items()}


def stacked_siren(params: Mapping[str, Tensor], x: Tensor, omega: float) -> Tensor:
    """Return the values `(K, n, out)` of K stacked SIRENs at coordinates `(K, n, in)`, without an offset."""
    layers = len(params) // 2
    for layer in range(layers):
        weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
        x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))  # [K, n, out]
        if layer < layers - 1:
            x = (omega * x).sin()
    return x


def pixel_grid(height: int, width: int, x_first: bool = True) -> Tensor:
    """Return coordinates `(height * width, 2)` in [-1, 1], row by row: (x, y) as in DWSNets, or (y, x) as in NFN."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y] if x_first else [y, x], -1).view(-1, 2)
