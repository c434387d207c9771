"""`verify`: run a network before and after a permutation, and compare its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from .boxes import SymmetryError
from .core import Symmetry
from .finding import find_symmetry
from .running import evaluation, split_inputs, tensors_in, uncompiled

TOLERANCE = 1e-5
ATTEMPTS = 5


def random_weights(net: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random numbers for every floating-point parameter and running statistic.

    With biases of zero, gains of one or running means of zero many wrong permutations would look right.
    """

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64, device=generator.device)

    found: dict[str, Tensor] = {}
    drawn: dict[int, Tensor] = {}  # tied tensors get the same numbers under every name
    for name, p in net.named_parameters(remove_duplicate=False):
        last = name.rpartition(".")[2]
        if not p.is_floating_point():
            continue
        if id(p) in drawn:
            value = drawn[id(p)]
        elif p.ndim >= 2:
            value = noise(p) * math.sqrt(2 / max(1, p[0].numel()))
        else:
            value = 1 + 0.3 * noise(p) if "weight" in last else 0.3 * noise(p)
        drawn[id(p)] = value
        found[name] = value.to(p)
    for name, b in net.named_buffers():
        if name.endswith("running_mean"):
            found[name] = (0.3 * noise(b)).to(b)
        elif name.endswith("running_var"):
            found[name] = (0.5 + noise(b).square()).to(b)
    return found


def verify(
    net: nn.Module,
    example_inputs: Any,
    symmetry: Symmetry | None = None,
    *,
    generator: torch.Generator | None = None,
    randomise: bool = True,
    trials: int = 3,
    tolerance: float = TOLERANCE,
) -> float:
    """Return the largest relative change of a network's output under random permutations of its hidden units.

    The network runs in evaluation mode, without gradients, and is not changed. The change is
    `max |f(g x) - f(x)| / max |f(x)|` over all output tensors of a trial. Sums in another order change a float32 output
    by some 1e-7 to 1e-6, and deep networks by more: a trial with a larger change than allowed is run again in float64,
    where the network can be, before it counts. Networks in half precision run in float32.

    Args:
        net: as for `trace`.
        example_inputs: as for `trace`; random numbers, since zeros may hide a change.
        symmetry: the symmetry to check; `trace(net, example_inputs)` if None.
        generator: draws permutations and random weights; seeded with 0 by default.
        randomise: replace all weights and running statistics by random ones, so that no zero bias or fresh
            normalisation layer hides a change; they are drawn again, up to five times, while a deliberately wrong
            permutation does not change the output. False checks the network as it is.
        trials: number of permutations, each with new random weights.
        tolerance: the largest change allowed.

    Returns:
        The largest relative change, at most `tolerance`.

    Raises:
        SymmetryError: a larger change, an output that is not finite, or weights that do not fit the symmetry.

    Example:
        >>> import torch
        >>> from sne_fast.symmetry import verify
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> verify(net, torch.randn(2, 4)) < 1e-5
        True
    """
    if symmetry is None:
        symmetry = find_symmetry(net, example_inputs)
    net = uncompiled(net)
    args, kwargs = tree_map(_wide, split_inputs(example_inputs))
    generator = generator or torch.Generator().manual_seed(0)
    named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    given = {name: _wide(t.detach()) for name, t in named}

    def run(weights: dict[str, Tensor]) -> list[Tensor]:
        out = functional_call(net, weights, args, kwargs, tie_weights=False)
        return [t.detach().clone() for t in tensors_in(out)]

    worst = 0.0
    with evaluation(net):
        for _ in range(trials):
            for _ in range(ATTEMPTS if randomise and symmetry.groups else 1):
                weights = given
                if randomise:
                    weights = {**given, **{name: _wide(t) for name, t in random_weights(net, generator).items()}}
                permuted = symmetry.permute_state_dict(weights, generator)
                before, after = run(weights), run(permuted)
                if not randomise or _sensitive(run, weights, permuted, before, tolerance, generator):
                    break
            change = _largest_change(before, after)
            if not change <= tolerance:
                change = min(change, _change_in_float64(net, args, kwargs, weights, permuted))
            if not change <= tolerance:
                raise SymmetryError(
                    f"verify: a permutation of {symmetry.name!r} changes its output by {change:.1e} of its size, "
                    f"allowed are {tolerance:.0e}: the symmetry is wrong, or the output is not finite or not "
                    f"deterministic; explain() of the symmetry lists what it permutes"
                )
            worst = max(worst, change)
    return worst


def _sensitive(
    run: Callable[[dict[str, Tensor]], list[Tensor]],
    weights: dict[str, Tensor],
    permuted: dict[str, Tensor],
    before: list[Tensor],
    tolerance: float,
    generator: torch.Generator,
) -> bool:
    """Return whether a wrong permutation changes the output: where all ReLUs are off, for example, none does.

    The wrong permutation leaves out a random half of the tensors.
    """
    moved = [name for name in weights if not torch.equal(weights[name], permuted[name])]
    chosen = torch.rand(len(moved), generator=generator, device=generator.device) < 0.5
    wrong = {**weights, **{name: permuted[name] for name, c in zip(moved, chosen.tolist(), strict=True) if c}}
    return _largest_change(before, run(wrong), default=0.0) > 100 * tolerance


def _change_in_float64(
    net: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: dict[str, Tensor],
    permuted: dict[str, Tensor],
) -> float:
    """Return the change of the output in float64, inf where the network does not run in it."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tree_map(double, (args, kwargs))
    default = torch.get_default_dtype()
    outs = []
    try:
        torch.set_default_dtype(torch.float64)  # of the constants that the network makes
        for state in (weights, permuted):
            wide = {name: double(t) for name, t in state.items()}
            outs.append(list(tensors_in(functional_call(net, wide, args, kwargs, tie_weights=False))))
    except Exception:  # whatever a network raises that insists on another dtype
        return math.inf
    finally:
        torch.set_default_dtype(default)
    return _largest_change(outs[0], outs[1])


def _largest_change(before: list[Tensor], after: list[Tensor], default: float = math.inf) -> float:
    return max((_relative_change(a, b) for a, b in zip(before, after, strict=True)), default=default)


def _wide(value: Any) -> Any:
    """Return half precision as float32: halves lose more than the tolerance when sums are taken in another order."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _relative_change(before: Tensor, after: Tensor) -> float:
    """Return the largest change relative to the largest value: 0 for equal tensors, inf where a value is not finite."""
    if before.shape != after.shape or not before.is_floating_point():
        return 0.0 if before.shape == after.shape and torch.equal(before, after) else math.inf
    if before.numel() == 0:
        return 0.0
    before, after = before.double(), after.double()
    size, change = float(before.abs().max()), float((after - before).abs().max())
    if not math.isfinite(size) or not math.isfinite(change):
        return math.inf
    return change / size if size > 0 else (0.0 if change == 0 else math.inf)
