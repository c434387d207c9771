"""search, duplicates, lineage, compare and map on files, zoos and folders of vectors."""

import csv
import json

import pytest
import torch

from helpers.command_line import call, fails
from sne_fast.data.checkpoints import save_state_dict
from sne_fast.zoo.shards import ZooWriter

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


def data_of(file):
    """Return what a page knows of its networks."""
    text = file.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


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


def test_networks_whose_vectors_are_not_finite(networks, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    state = torch.nn.Linear(5, 4).state_dict()
    state["weight"][0, 0] = float("nan")
    save_state_dict(state, networks / "spoilt.safetensors")
    assert call("encode", networks, "-o", tmp_path / "vectors", "--nonfinite", "keep").exit_code == 0
    result = call("search", tmp_path / "vectors", networks / "base.safetensors", networks / "spoilt.safetensors")
    assert result.exit_code == 1 and "spoilt.safetensors" in result.stderr and "is not finite" in result.stderr
    assert len(rows_of(result)) == 5  # a header and the four others
    result = call("map", tmp_path / "vectors", "-o", tmp_path / "map.html")
    assert result.exit_code == 0 and len(data_of(tmp_path / "map.html")["names"]) == 5
    assert "1 networks of" in result.stdout and "have no vector of finite numbers" in result.stdout
    result = call("duplicates", tmp_path / "vectors")
    assert result.exit_code == 0 and "2 of 6 networks are copies" in result.stdout


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
    assert call("lineage", networks, "-o", tmp_path / "tree.html").exit_code == 0
    assert [row["edge"] for row in data_of(tmp_path / "tree.html")["rows"]] == [None, 0]
    assert f"Lineage of 4 networks in {networks}</title>" in (tmp_path / "tree.html").read_text()
    assert "must end in .csv or .dot or .html" in fails("lineage", networks, "-o", tmp_path / "tree.svg")
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


def test_map_of_vectors_with_a_table(networks, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    (networks / "deep").mkdir()
    hostile = "<img src=x onerror=alert(1)>"
    (networks / "other.safetensors").rename(networks / "deep" / f"{hostile}.safetensors")
    (networks / "bad.safetensors").write_bytes(b"nothing")
    call("encode", networks, "-o", tmp_path / "vectors")
    lines = ["name,accuracy,recipe", "base,0.5,sgd", "copy.safetensors,0.25,", f"{hostile},,<b>", ",1,", ",1,"]
    (tmp_path / "known.csv").write_text("\n".join([*lines, ""]))
    page = tmp_path / "out" / "networks.html"
    page.parent.mkdir()
    result = call("map", tmp_path / "vectors", "-o", page, "--table", tmp_path / "known.csv", "--colour", "recipe")
    assert result.exit_code == 0, result.output
    assert "1 networks of" in result.stdout and "have no vector" in result.stdout
    assert "2 networks are not in" in result.stdout
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert hostile not in page.read_text() and f"in {networks}</title>" in page.read_text()
    data = data_of(page)
    names = ["base.safetensors", "copy.safetensors", f"deep/{hostile}.safetensors", "permuted.safetensors"]
    assert data["names"] == [*names, "pruned.safetensors"] and data["colour"] == 1
    columns = {column["name"]: column for column in data["columns"]}
    assert list(columns) == ["accuracy", "recipe", "folder", "weights"]
    assert columns["accuracy"]["values"] == [0.5, 0.25, None, None, None]
    assert columns["recipe"]["groups"] == ["<b>", "sgd"] and columns["recipe"]["values"] == [1, None, 0, None, None]
    assert columns["folder"]["groups"] == ["", "deep"] and columns["weights"]["values"] == [404] * 5
    assert data["near"][0][0] == 1 and len(data["near"][0]) == 4  # the copy
    first = page.read_bytes()
    assert call("map", tmp_path / "vectors", "-o", page, "--table", tmp_path / "known.csv").exit_code == 0
    assert {**data, "colour": 0} == data_of(page) != json.loads(first.split(b'id="data">')[1].split(b"</script>")[0])

    (tmp_path / "strange.csv").write_text("name,accuracy\nnothing,0.5\n")
    (tmp_path / "twice.csv").write_text("name,accuracy\nbase,0.5\nbase,0.6\n")
    (tmp_path / "keyless.csv").write_text("network,accuracy\nbase,0.5\n")
    for table, message in [
        ("strange", "the column 'name' names none of the networks"),
        ("twice", "the column 'name' names 'base' twice"),
        ("keyless", "must have a column that names the networks, one of uri, file, path"),
        ("none", "there is no such file"),
    ]:
        assert message in fails("map", tmp_path / "vectors", "-o", page, "--table", tmp_path / f"{table}.csv")
    assert "--colour must be a column, one of folder, weights; got 'x'" in fails(
        "map", tmp_path / "vectors", "-o", page, "--colour", "x"
    )
    assert "must end in .html" in fails("map", tmp_path / "vectors", "-o", tmp_path / "map.png")
    assert "holds no vectors" in fails("map", networks, "-o", page)


def test_map_of_a_zoo_has_its_columns(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    with ZooWriter(tmp_path / "zoo") as writer:
        for k, name in enumerate("abc"):
            writer.add(name, torch.nn.Linear(5, 1).state_dict(), {"accuracy": k / 10})
    call("encode", tmp_path / "zoo", "-o", tmp_path / "vectors")
    result = call("map", tmp_path / "vectors", "-o", tmp_path / "map.html")
    assert result.exit_code == 0, result.output
    assert "coloured by accuracy" in result.stdout
    data = data_of(tmp_path / "map.html")
    assert data["names"] == ["a", "b", "c"]
    assert data["columns"][0] == {"name": "accuracy", "kind": "number", "values": [0.0, 0.1, 0.2]}
    assert [column["name"] for column in data["columns"]] == ["accuracy", "weights"]
