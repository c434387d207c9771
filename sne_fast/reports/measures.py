"""Measures of how well numbers are predicted, and rows of a table of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

COLUMNS = ("", "Kendall's tau", "p-value", "R2", "MAE", "RMSE")
"""Headers of a table of measures."""


def measures(predicted: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Return Kendall's tau-b with its two-sided p-value, R2, mean absolute error and root mean square error.

    A measure that is not defined is None: tau and its p-value where all predictions or all true values are equal, R2
    where all true values are, and every measure where a prediction is not finite.

    Example:
        >>> import numpy as np
        >>> measures(np.array([0.25, 0.75]), np.array([0.5, 1.0]))["mae"]
        0.25
    """
    from scipy.stats import kendalltau

    predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    found: dict[str, float | None] = dict.fromkeys(("tau", "tau_p", "r2", "mae", "rmse"))
    if not (len(true) and np.isfinite(predicted).all() and np.isfinite(true).all()):
        return found
    error = predicted - true
    found["mae"], found["rmse"] = float(np.abs(error).mean()), float(np.sqrt((error**2).mean()))
    if np.ptp(true) > 0:
        found["r2"] = float(1 - (error**2).sum() / ((true - true.mean()) ** 2).sum())
        if np.ptp(predicted) > 0:
            tau = kendalltau(predicted, true)
            found["tau"], found["tau_p"] = float(tau.statistic), float(tau.pvalue)
    return {name: None if value is None or not np.isfinite(value) else value for name, value in found.items()}


def tau_above(predicted: np.ndarray, true: np.ndarray, threshold: float) -> float | None:
    """Return Kendall's tau-b among the networks whose true value is above a threshold; None where it is not defined.

    The order of accuracies near chance is noise, so a tau of all networks says little about a zoo with many of them.

    Example:
        >>> import numpy as np
        >>> tau_above(np.array([0.9, 0.3, 0.5]), np.array([0.1, 0.4, 0.8]), 0.2)
        1.0
    """
    chosen = true > threshold
    return measures(predicted[chosen], true[chosen])["tau"]


def class_measures(probabilities: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Return accuracy and mean cross entropy of probabilities `(n, classes)` against classes `(n,)`.

    Probabilities count as at least 1e-7. Both measures are None where a probability is not finite.

    Example:
        >>> import numpy as np
        >>> class_measures(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]), np.array([0, 1, 1]))["accuracy"]
        0.6666666666666666
    """
    if not (len(true) and np.isfinite(probabilities).all()):
        return {"accuracy": None, "cross_entropy": None}
    own = probabilities[np.arange(len(true)), true.astype(np.int64)]
    hits = probabilities.argmax(1) == true
    return {"accuracy": float(hits.mean()), "cross_entropy": float(-np.log(own.clip(1e-7)).mean())}


def why_undefined(predicted: np.ndarray, true: np.ndarray) -> str | None:
    """Return why some of the `measures` are None; None if all are numbers.

    Example:
        >>> import numpy as np
        >>> why_undefined(np.array([0.25, 0.75]), np.array([0.5, 0.5]))
        'tau, tau_p, r2: all true values are equal'
    """
    undefined = [name for name, value in measures(predicted, true).items() if value is None]
    if not undefined:
        return None
    reasons = (
        (not len(true), "there are no networks"),
        (not np.isfinite(predicted).all(), "a prediction is not finite"),
        (not np.isfinite(true).all(), "a true value is not finite"),
        (len(true) == 1, "there is one network only"),
        (len(true) and np.ptp(true) == 0, "all true values are equal"),
        (len(true) and np.ptp(predicted) == 0, "all predictions are equal"),
    )
    why = next((reason for holds, reason in reasons if holds), "the numbers are too large or too close")
    return f"{', '.join(undefined)}: {why}"


def number_or_dash(value: float | None, form: str) -> str:
    """Return a number in a format such as ".3f", or "-" for a measure that is not defined."""
    return "-" if value is None else f"{value:{form}}"


def measure_rows(results: Mapping[str, Mapping[str, float | None]]) -> list[list[str]]:
    """Return a row of text for each model: its name and its measures in the order of `COLUMNS`."""
    forms = {"tau": ".3f", "tau_p": ".1e", "r2": ".3f", "mae": ".3f", "rmse": ".3f"}
    return [[name, *(number_or_dash(row[key], form) for key, form in forms.items())] for name, row in results.items()]
