"""The benchmark that compares a module with its files: what it calls a difference, its networks and its page."""

from __future__ import annotations

import json

import agreement
import agreement_report
import named_networks
import pytest
import torch
from torch import Tensor, nn

import sne_fast

STATE = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3), "b.weight": torch.randn(2, 3)}


def difference(other: dict[str, Tensor], **options: object) -> str:
    one, two = (sne_fast.pack([state], kinds="names", **extra) for state, extra in ((STATE, {}), (other, options)))
    return agreement.difference(one, two)


def test_names_alone_are_no_difference() -> None:
    assert difference({name.replace("b.", "c."): tensor for name, tensor in STATE.items()}) == ""


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({**STATE, "c.weight": torch.randn(2, 2)}, "tensors: 1 more: c.weight"),
        ({name: STATE[name] for name in ("a.weight", "b.weight")}, "tensors: 1 lacking: a.bias"),
        (
            {"b.weight": STATE["b.weight"] + 1, "a.weight": STATE["a.weight"], "a.bias": STATE["a.bias"]},
            "tensors: 1 lacking: b.weight; 1 more: b.weight",
        ),
        (
            {"c.weight": STATE["a.weight"], "c.bias": STATE["a.bias"], "b.weight": STATE["b.weight"]},
            "order: b.weight in the place of a.weight",
        ),
        (
            {"a.weight": STATE["a.weight"], "aa.bias": STATE["a.bias"], "b.weight": STATE["b.weight"]},
            "layers: aa.bias is in layer 1 and not 0",
        ),
        (
            {"a.weight": STATE["a.weight"], "a.bias": STATE["a.bias"], "b.embed.weight": STATE["b.weight"]},
            "types: 1, b.embed.weight is 32 and not 0",
        ),
    ],
)
def test_differences_are_said(other: dict[str, Tensor], found: str) -> None:
    assert difference(other) == found


def test_the_order_of_definition_correlates_with_that_of_names() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    assert agreement.rank_correlation(network) == 1
    assert agreement.rank_correlation(nn.Linear(2, 2)) is None
    backwards = nn.Module()
    for name in ("c", "b", "a"):
        backwards.add_module(name, nn.Linear(2, 2))
    assert agreement.rank_correlation(backwards) == -1


def test_networks_written_down_have_the_classes_of_torch() -> None:
    network = named_networks.build("torchvision", "resnet18")
    assert isinstance(network.layer1[0].conv1 if hasattr(network.layer1, "__getitem__") else network.conv1, nn.Conv2d)
    assert network.bn1.running_mean.shape == network.bn1.weight.shape
    assert len(named_networks.NAMES) >= 30 and len(set(named_networks.NAMES)) == len(named_networks.NAMES)
    for name in named_networks.NAMES:
        assert sum(1 for _ in named_networks.build(*name.split("/")).parameters()) > 10


def test_the_page_shows_the_committed_results() -> None:
    results = json.loads(agreement.RESULTS.read_text(encoding="utf-8"))
    assert agreement_report.section(results) in agreement_report.PAGE.read_text(encoding="utf-8")


def test_at_least_95_percent_agree() -> None:
    rows = [row for row in json.loads(agreement.RESULTS.read_text(encoding="utf-8"))["rows"] if "differs" in row]
    assert len(rows) >= 300
    for source in ("state_dict", "bin", "folder_rebuilt"):
        compared = [row for row in rows if source in row["differs"]]
        assert sum(agreement.agrees(row, source) for row in compared) >= 0.95 * len(compared)
