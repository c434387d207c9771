"""Measures of how well numbers are predicted, and a table of them for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping


def measures(predicted: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Return Kendall's tau-b with its two-sided p-value, R2, mean absolute error and root mean square error.

    tau and its p-value are None where all predictions are equal, since neither is defined there.

    Example:
        >>> import numpy as np
        >>> measures(np.array([0.25, 0.75]), np.array([0.5, 1.0]))["mae"]
        0.25
    """
    from scipy.stats import kendalltau

    error = predicted - true
    constant = bool(np.all(predicted == predicted[0]))
    tau = None if constant else kendalltau(predicted, true)
    return {
        "tau": None if tau is None else float(tau.statistic),
        "tau_p": None if tau is None else float(tau.pvalue),
        "r2": float(1 - (error**2).sum() / ((true - true.mean()) ** 2).sum()),
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
    }


def measures_table(title: str, results: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Return the measures of each model as a table for the terminal."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown.add_column("")
    for column in ("Kendall's tau", "p-value", "R2", "MAE", "RMSE"):
        shown.add_column(column, justify="right")
    for name, row in results.items():
        shown.add_row(
            name,
            "-" if row["tau"] is None else f"{row['tau']:.3f}",
            "-" if row["tau_p"] is None else f"{row['tau_p']:.1e}",
            *(f"{row[key]:.3f}" for key in ("r2", "mae", "rmse")),
        )
    return shown
