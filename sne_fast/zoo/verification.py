"""Verification of zoos: networks are rebuilt from their weights and run, and their results compared with the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .table import Zoo

Row = Mapping[str, Any]

_VERIFIERS = {
    "classifiers": ".classifiers",
    "sine_inrs": ".inrs",
    "unterthiner": ".unterthiner",
    "schuerholt": ".schuerholt",
    "dwsnets": ".inr_folders",
    "nfn": ".inr_folders",
}
"""`about["source"]` of a zoo -> the module whose `verify` knows how its networks are rebuilt."""


class VerifyError(ValueError):
    """Error of a network whose result differs from the table."""


def verify(zoo: Zoo, networks: Sequence[int] | None = None, *, tolerance: float | None = None, **data: Any) -> float:
    """Rebuild networks of a zoo from their weights, run them, and compare the results with the table.

    It finds errors that nothing else shows, such as a loader that transposes a kernel wrongly or a table whose rows are
    shifted: both leave the number of weights right.

    Args:
        zoo: of a maker or loader of this package, also after `save` and `Zoo.open`; or any zoo, with `build`, `measure`
            and `column`, see `compare`.
        networks: positions of the networks to check; all of them by default.
        tolerance: largest difference that is accepted; any by default.
        data: data that the zoo does not hold: `images` and `labels` for the zoos of Unterthiner and Schürholt, `images`
            for INRs of images; see `verify` in `unterthiner`, `schuerholt` and `inr_folders`.

    Returns:
        The largest difference found: of accuracies in [0, 1] for classifiers, of mean squared errors for INRs.

    Raises:
        VerifyError: a difference above `tolerance`; the message names the network.
        ValueError: weights that do not fit their architecture, a missing argument, or a zoo of unknown source.

    Example:
        >>> verify(make_digits_zoo("digits", 18, max_steps=5), tolerance=0.002) < 1e-6
        True
        >>> verify(load_unterthiner("svhn_cropped"), range(20), images=svhn_test, labels=svhn_labels) < 0.01
        True
    """
    chosen = range(len(zoo)) if networks is None else networks
    source = zoo.about.get("source")
    if "build" in data:
        found = compare(zoo, chosen, **data)
    elif source in _VERIFIERS:
        found = import_module(_VERIFIERS[source], __package__).verify(zoo, chosen, **data)
    else:
        raise ValueError(
            f"verify: no way is known to rebuild networks of source {source!r}; give build=, measure= and column="
        )
    worst = max(found, default=(0.0, ""))
    if tolerance is not None and not worst[0] <= tolerance:
        raise VerifyError(f"verify: {worst[1]} differs by {worst[0]:.4g} from the table, more than {tolerance:.4g}")
    return worst[0]


@torch.no_grad()
def compare(
    zoo: Zoo,
    networks: Sequence[int],
    *,
    build: Callable[[Row], nn.Module],
    measure: Callable[[nn.Module, Row], float],
    column: str,
) -> list[tuple[float, str]]:
    """Return how far `measure` of each rebuilt network is from its `column`, as pairs of difference and name.

    Args:
        zoo: any zoo.
        networks: positions of the networks.
        build: makes the module of a row; the network's state_dict is loaded into it, strictly.
        measure: runs the module, in evaluation mode and without gradients.
        column: the column with the number that `measure` returned when the zoo was made.

    Raises:
        ValueError: a network that does not fit its module, or without a number in `column`.
    """
    found = []
    for i in networks:
        row = zoo.rows[i]
        if not isinstance(row.get(column), (int, float)):
            raise ValueError(f"verify: {row['name']} has no number in column {column!r} to compare with")
        module = build(row)
        fit(module, zoo.state_dict(i), row)
        found.append((abs(measure(module.eval(), row) - float(row[column])), str(row["name"])))
    return [(difference if difference == difference else float("inf"), name) for difference, name in found]


def fit(module: nn.Module, state_dict: Mapping[str, Tensor], row: Row) -> None:
    """Load weights into a module.

    Raises:
        ValueError: they do not fit; the message names the network.
    """
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(
            f"verify: {row['name']} does not fit {row.get('architecture', 'its module')}: {error}"
        ) from error


def accuracy(module: nn.Module, images: Tensor, labels: Tensor, batch: int = 2048) -> float:
    """Return the share of images `(n, ...)` whose largest logit is that of the label."""
    hits = [
        int((module(images[k : k + batch]).argmax(1) == labels[k : k + batch]).sum())
        for k in range(0, len(labels), batch)
    ]
    return sum(hits) / len(labels)


def check_images(source: str, images: Tensor | None, labels: Tensor | None, channels: str) -> tuple[Tensor, Tensor]:
    """Return the test images and labels that `verify` needs for zoos that do not hold them.

    Raises:
        ValueError: they are missing, or do not fit each other.
    """
    if images is None or labels is None:
        raise ValueError(
            f"verify: zoos of source {source!r} hold no images: give images= {channels} and labels= (n,), the test "
            "set that the recorded accuracies were measured on"
        )
    if images.ndim != 4 or len(images) != len(labels):
        raise ValueError(f"verify: images must be {channels} with a label each, got {tuple(images.shape)}")
    return images, labels
