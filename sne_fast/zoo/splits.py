"""Parts and targets of a zoo for training: which networks train, validate and test, and what is predicted of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.weight_budgets import stratified_split
from .table import Zoo

PARTS = ("train", "validation", "test")
_ALSO = {"val": "validation"}  # as the loaders of published INRs call it
SHARES = (0.8, 0.1, 0.1)
"""Shares of the networks that train, validate and test, where no column says which do."""


def split_zoo(zoo: Zoo, column: str | None, seed: int) -> dict[str, list[int]]:
    """Split the networks of a zoo into training, validation and test networks.

    Args:
        column: the column that says "train", "validation" (or "val", as :func:`sne_fast.zoo.load_nfn` has it) or
            "test"; None splits 80/10/10 within each architecture.
        seed: of the split, where there is no column.

    Returns:
        Positions of the networks of each part, by its name.

    Raises:
        KeyError: no such column.
        ValueError: a column with other values, or a split without training or test networks.
    """
    if column is None:
        groups = [str(a) for a in zoo.column("architecture")] if "architecture" in zoo.columns else [""] * len(zoo)
        parts = dict(zip(PARTS, stratified_split(groups, SHARES, seed), strict=True))
    else:
        given = [_ALSO.get(str(value), str(value)) for value in zoo.column(column)]
        unknown = sorted({value for value in given if value not in PARTS})
        if unknown:
            raise ValueError(f"split_zoo: column {column!r} must say {', '.join(PARTS)}, got {', '.join(unknown[:5])}")
        parts = {name: [i for i, value in enumerate(given) if value == name] for name in PARTS}
    for name in ("train", "test"):
        if not parts[name]:
            raise ValueError(f"split_zoo: the split leaves no {name} networks of {len(zoo)}")
    return parts


def missing_targets(zoo: Zoo, columns: Sequence[str]) -> list[int]:
    """Return the positions of the networks that lack a value, None or NaN, in one of the columns.

    Raises:
        KeyError: no such column.
    """
    values = [zoo.column(name).tolist() for name in columns]
    return [i for i in range(len(zoo)) if any(v[i] is None or v[i] != v[i] for v in values)]


def _check_complete(zoo: Zoo, columns: Sequence[str]) -> None:
    absent = missing_targets(zoo, columns)
    if absent:
        names = ", ".join(repr(zoo.rows[i]["name"]) for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise ValueError(
            f"read_targets: {len(absent)} of {len(zoo)} networks have no value in {' or '.join(map(repr, columns))}: "
            f"{names}; leave them out (train --drop-missing)"
        )


def read_targets(zoo: Zoo, columns: Sequence[str], loss: str) -> tuple[Tensor, list[str] | None]:
    """Read the targets of a predictor from columns of a zoo.

    Args:
        columns: names of columns of numbers; for the loss "cross_entropy" one column, of any values.
        loss: the loss of the predictor, see :class:`sne_fast.Predictor`.

    Returns:
        Targets `(n, t)` in the default dtype and None, or class indices `(n,)` int64 and the names of the classes.

    Raises:
        KeyError: no such column.
        ValueError: columns that do not fit the loss, or that lack a value.
    """
    if loss == "cross_entropy":
        if len(columns) != 1:
            raise ValueError(
                f"read_targets: cross_entropy takes one column of classes, got {', '.join(columns) or 'none'}"
            )
        _check_complete(zoo, columns)
        values = zoo.column(columns[0]).tolist()
        found = sorted(set(values))
        return torch.tensor([found.index(value) for value in values]), [str(value) for value in found]
    if not columns:
        raise ValueError(f"read_targets: give at least one target; the zoo has {', '.join(zoo.targets or zoo.columns)}")
    _check_complete(zoo, columns)
    numbers = []
    for name in columns:
        values = zoo.column(name)
        if values.dtype.kind not in "iufb":
            raise ValueError(f"read_targets: column {name!r} must hold a number for every network")
        numbers.append(torch.from_numpy(values.astype("float64")))
    return torch.stack(numbers, 1).to(torch.get_default_dtype()), None
