"""Rebuilding of networks from their weights, and comparison of their results with the table of their zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .table import Zoo

Row = Mapping[str, Any]


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
        load_weights(module, zoo.state_dict(i), row)
        found.append((abs(measure(module.eval(), row) - float(row[column])), str(row["name"])))
    return [(difference if difference == difference else float("inf"), name) for difference, name in found]


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor], row: Row) -> None:
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
