"""Paired differences between methods on the same test networks, with their standard errors.

A method and a reference are trained with seeds s = 1..S, and each pair is measured on the same test networks of its
seed: d_s = m(method) - m(reference), where m is Kendall's tau, R2, an error or a share of hits. The difference is their
mean D. It would be another one with other test networks and with other seeds (of the split, the order of training and
the first weights), and its standard error honours both:

- Every measure m is a smooth function of means over networks or over pairs of networks. To first order it moves by
  a_i when network i is one more of the sample, the influence of i over n (Hajek's projection; for tau the influence of
  a U-statistic of degree 2, of its numerator and of both factors of its denominator). The influences of a difference
  are differences of influences, so that what both methods find hard cancels. With a_si = 0 for networks that seed s
  does not test, and abar_i the mean of a_si over seeds, test networks contribute `sum_i abar_i^2`. A network that
  several seeds test counts as one network.
- Seeds contribute V / S, with V the variance of d_s between seeds beyond what their test networks explain,
  `max(0, var_s(d_s) - sum_s sum_i (a_si - abar_i)^2 / (S - 1))`: a two-way analysis of variance with random networks
  and random seeds. With one seed V is taken as 0, and the standard error is that of test networks alone. As V is cut
  at 0, the standard error of few seeds is rather too large (by a seventh for three seeds that do not differ).

This needs no resampling, and costs n^2 comparisons per method and seed for tau, n for the others. Differences beyond
two standard errors are rarely chance; those of tables of many rows sometimes are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ABOVE = 0.2
"""True accuracy above which networks count for `tau_above`."""
BLOCK = 512
"""Rows of the matrix of pairs that are compared at a time."""

Influence = Callable[[np.ndarray, np.ndarray], "tuple[float, np.ndarray] | None"]
"""Function of predictions and true values that returns a measure and how far each network moves it, `(n,)`."""


@dataclass(frozen=True)
class PairedRun:
    """Predictions of a method and of its reference for the test networks of one seed.

    Args:
        networks: which networks these are, `(n,)` whole numbers that mean the same for all seeds.
        true: the targets `(n,)`; classes as whole numbers.
        predicted: by the method, `(n,)`, or probabilities `(n, classes)`.
        reference: by the reference, of the same shape.
    """

    networks: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class PairedDifference:
    """Mean over seeds of the measure of a method minus that of the reference, its standard error, and the seeds."""

    mean: float
    standard_error: float
    seeds: int


def paired_difference(runs: Sequence[PairedRun], measure: str) -> PairedDifference | None:
    """Return the difference between a method and a reference, see this module.

    Args:
        runs: one for each seed.
        measure: a key of `INFLUENCES`.

    Returns:
        None without runs, or where the measure is not defined for one of them, such as tau of equal predictions.

    Raises:
        ValueError: an unknown measure, or arrays of different lengths.

    Example:
        >>> import numpy as np
        >>> true = np.array([0.1, 0.2, 0.3, 0.4])
        >>> run = PairedRun(np.arange(4), true, true, np.array([0.2, 0.1, 0.3, 0.4]))
        >>> round(paired_difference([run], "tau").mean, 3)
        0.333
    """
    if measure not in INFLUENCES:
        raise ValueError(f"paired_difference: measure must be one of {', '.join(INFLUENCES)}, got {measure!r}")
    found = [_of_run(run, INFLUENCES[measure]) for run in runs]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    count = len(known)
    ids, places = np.unique(np.concatenate([run.networks for run in runs]), return_inverse=True)
    seeds = np.repeat(np.arange(count), [len(run.networks) for run in runs])
    moves = np.zeros((count, len(ids)))  # a_si
    moves[seeds, places] = np.concatenate([influence for _, influence in known])
    differences = np.array([difference for difference, _ in known])
    mean = moves.mean(0)
    variance = float((mean**2).sum())
    if count > 1:
        explained = float(((moves - mean) ** 2).sum()) / (count - 1)
        variance += max(0.0, float(differences.var(ddof=1)) - explained) / count
    return PairedDifference(float(differences.mean()), variance**0.5, count)


def _of_run(run: PairedRun, influence_of: Influence) -> tuple[float, np.ndarray] | None:
    """Return the difference of one seed, and how far each network moves it."""
    lengths = {len(run.networks), len(run.true), len(run.predicted), len(run.reference)}
    if len(lengths) > 1:
        raise ValueError(f"paired_difference: a run must have arrays of one length, got {sorted(lengths)}")
    sides = [influence_of(predicted, run.true) for predicted in (run.predicted, run.reference)]
    if sides[0] is None or sides[1] is None:
        return None
    (one, moves), (other, other_moves) = sides[0], sides[1]
    return one - other, moves - other_moves


def _scaled(value: float, influence: np.ndarray) -> tuple[float, np.ndarray] | None:
    """Return a measure and `influence / n`, with the factor that makes the variance of a mean unbiased."""
    n = len(influence)
    return (value, influence / (n * (n - 1)) ** 0.5) if n > 1 and np.isfinite(value) else None


def tau_influence(predicted: np.ndarray, true: np.ndarray) -> tuple[float, np.ndarray] | None:
    """Return Kendall's tau-b and how far each of n networks moves it, `(n,)`; None where tau is not defined.

    With k, p and t the means over pairs of networks of sign(dx) sign(dy), |sign(dx)| and |sign(dy)|,
    `tau = k / sqrt(p t)`. With the means k_i, p_i and t_i over the pairs of network i, its influence is that of a
    U-statistic of degree 2, `2 (k_i - k) / sqrt(p t) - tau ((p_i - p) / p + (t_i - t) / t)`.
    """
    n = len(true)
    if n < 2 or not (np.isfinite(predicted).all() and np.isfinite(true).all()):
        return None
    sums = np.empty((3, n))
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        x = np.sign(np.subtract.outer(predicted[rows], predicted)).astype(np.int8)
        y = np.sign(np.subtract.outer(true[rows], true)).astype(np.int8)
        sums[:, rows] = (x * y).sum(1), np.abs(x).sum(1), np.abs(y).sum(1)
    of_each = sums / (n - 1)
    agreement, spread, true_spread = means = of_each.mean(1)
    if not spread * true_spread > 0:
        return None
    root = (spread * true_spread) ** 0.5
    tau = float(agreement / root)
    centred = of_each - means[:, None]
    return _scaled(tau, 2 * centred[0] / root - tau * (centred[1] / spread + centred[2] / true_spread))


def tau_above_influence(predicted: np.ndarray, true: np.ndarray) -> tuple[float, np.ndarray] | None:
    """Return the same as `tau_influence` of the networks with a true value above 0.2, which alone move it."""
    chosen = true > ABOVE
    found = tau_influence(predicted[chosen], true[chosen])
    if found is None:
        return None
    moves = np.zeros(len(true))
    moves[chosen] = found[1]
    return found[0], moves


def _r2(predicted: np.ndarray, true: np.ndarray) -> tuple[float, np.ndarray] | None:
    squares, spreads = (predicted - true) ** 2, (true - true.mean()) ** 2
    mse, variance = squares.mean(), spreads.mean()
    if not variance > 0:
        return None
    return _scaled(float(1 - mse / variance), mse / variance**2 * (spreads - variance) - (squares - mse) / variance)


def _mean_of(of_each: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Influence:
    """Return the influence function of a mean over networks."""

    def influence(predicted: np.ndarray, true: np.ndarray) -> tuple[float, np.ndarray] | None:
        values = of_each(predicted, true)
        return _scaled(float(values.mean()), values - values.mean()) if len(values) else None

    return influence


def _own(probabilities: np.ndarray, true: np.ndarray) -> np.ndarray:
    return np.asarray(probabilities[np.arange(len(true)), true.astype(np.int64)])


INFLUENCES: Mapping[str, Influence] = {
    "tau": tau_influence,
    "tau_above": tau_above_influence,
    "r2": _r2,
    "mse": _mean_of(lambda predicted, true: (predicted - true) ** 2),
    "mae": _mean_of(lambda predicted, true: np.abs(predicted - true)),
    "accuracy": _mean_of(lambda predicted, true: (predicted.argmax(1) == true).astype(np.float64)),
    "cross_entropy": _mean_of(lambda predicted, true: -np.log(_own(predicted, true).clip(1e-7))),
}
"""Measure, by its name in results -> the measure and its influences."""
