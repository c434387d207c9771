"""search, duplicates, lineage and compare on files, zoos and folders of vectors."""

import csv
import json

import pytest
import torch

from helpers.command_line import call, fails
from sne_fast.data.checkpoints import save_state_dict

pytest.importorskip("pyarrow")


@pytest.fixture
def networks(tmp_path):
    """Write a network, a copy, a pruned and a permuted one, and one of its own."""
    folder = tmp_path / "networks"
    folder.mkdir()
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Linear(16, 4)) for _ in range(2)]
    base = nets[0].state_dict()
    made = {
        "base": base,
        "copy": base,
        "other": nets[1].state_dict(),
        "pruned": {name: t * (t.abs() > 0.08) if t.ndim > 1 else t for name, t in base.items()},
        "permuted": {**base, "0.weight": base["0.weight"].flip(0), "0.bias": base["0.bias"].flip(0),
                     "1.weight": base["1.weight"].flip(1)},
    }  # fmt: skip
    for name, state in made.items():
        save_state_dict(state, folder / f"{name}.safetensors")
    return folder


def rows_of(result):
    return [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]


def test_search_in_vectors(networks, tmp_path):
    assert call("encode", networks, "-o", tmp_path / "vectors").exit_code == 0
    result = call("search", tmp_path / "vectors", networks / "base.safetensors", "-k", 2, "--json")
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout).values()
    assert answer[0]["name"].endswith("copy.safetensors") and answer[0]["distance"] < 1e-6 and len(answer) == 2
    # A network that is not there is encoded as the others were; a new one is not left out of its own results.
    save_state_dict(torch.nn.Linear(3, 2).state_dict(), tmp_path / "new.safetensors")
    (tmp_path / "again.safetensors").write_bytes((networks / "other.safetensors").read_bytes())
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    queries = [tmp_path / f"{name}.safetensors" for name in ("new", "again", "bad")]
    result = call("search", tmp_path / "vectors", *queries, "--metric", "euclidean")
    assert result.exit_code == 1 and "bad.safetensors" in result.stderr
    shown = rows_of(result)
    assert len(shown) == 2 * 6 and [row for row in shown if row[2].endswith("other.safetensors")][1][0] == "1"
    assert "holds no vectors; write them with sne-fast encode" in fails("search", networks, networks)
    assert "no such folder" in fails("search", tmp_path / "none", networks)


def test_duplicates_of_files_and_vectors(networks, tmp_path):
    call("encode", networks, "-o", tmp_path / "vectors")
    for source in (networks, tmp_path / "vectors"):
        result = call("duplicates", source, "-o", tmp_path / "copies.csv")
        assert result.exit_code == 0, result.output
        assert "2 of 5 networks are copies of others, in 2 groups" in result.stdout
        with open(tmp_path / "copies.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["kind"] for row in rows] == ["exact", "exact", "reordered", "reordered"]
        assert rows[1]["network"].endswith("copy.safetensors") and rows[3]["network"].endswith("permuted.safetensors")
    (networks / "bad.safetensors").write_bytes(b"nothing")
    result = call("duplicates", networks)
    assert result.exit_code == 1 and "bad.safetensors" in result.stderr and "2 of 5 networks" in result.stdout
    assert "must end in .csv" in fails("duplicates", networks, "-o", tmp_path / "copies.txt")
    assert "no" in fails("duplicates", tmp_path / "none.safetensors")


def test_lineage_as_table_and_graph(networks, tmp_path):
    (networks / "copy.safetensors").unlink()
    result = call("lineage", networks, "-o", tmp_path / "tree.dot")
    assert result.exit_code == 0, result.output
    (row,) = [row for row in rows_of(result) if row[2] == "prune"]
    assert row[0].endswith("pruned.safetensors") and row[1].endswith("base.safetensors")
    assert "1 families of 2 networks, 2 without relatives" in result.stdout
    assert (tmp_path / "tree.dot").read_text().count("->") == 1
    assert call("lineage", networks, "-o", tmp_path / "tree.csv").exit_code == 0
    assert len((tmp_path / "tree.csv").read_text().splitlines()) == 5
    assert "unrelated must lie in" in fails("lineage", networks, "--unrelated", 3)


def test_compare_shows_the_layers_that_changed(networks):
    result = call("compare", networks / "base.safetensors", networks / "pruned.safetensors")
    assert result.exit_code == 0, result.output
    assert [row[:3] for row in rows_of(result)[1:]] == [["0", "changed", "336"], ["1", "changed", "68"]]
    assert "2 layers: 2 changed" in result.stdout
    result = call("compare", networks / "base.safetensors", networks / "copy.safetensors")
    assert rows_of(result) == [] and "2 layers: 2 same" in result.stdout
    result = call("compare", networks / "base.safetensors", networks / "other.safetensors", "--json")
    assert [change["status"] for change in json.loads(result.stdout)] == ["changed", "changed"]
    assert "holds 5 networks; name one" in fails("compare", networks, networks / "base.safetensors")
