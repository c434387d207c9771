"""Results of many networks: rows, datasets that resume, and split networks that are joined."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.many_networks import encoder_of, network
from sne_fast import Predictor
from sne_fast.embedding import EmbeddingDataset, collect, embed_unit, embed_units, manifest, plan
from sne_fast.embedding import units as units_module

pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("options", [{}, {"statistics": "relative"}], ids=["plain", "statistics"])
def test_the_vectors_are_those_of_the_encoder(tree: Path, tmp_path: Path, options: dict) -> None:
    encoder = encoder_of(**options)
    dataset = EmbeddingDataset(tmp_path / "out", encoder, layers=True)
    units = plan(manifest([tree]), budget=3000)
    assert list(embed_units(dataset, units)) == units and list(embed_units(dataset, units)) == []
    rows = {row["uri"]: row for row in collect(tmp_path / "out").to_pylist()}
    assert "is damaged" in rows.pop(str(tree / "damaged.safetensors"))["error"] and len(rows) == 7
    for uri, row in rows.items():
        with torch.no_grad():
            want = encoder([uri])[0]
        torch.testing.assert_close(torch.tensor(row["vector"]), want, rtol=0, atol=1e-5)
        assert row["error"] is None and row["seconds"] > 0


def test_a_network_that_fails_is_a_row(tree: Path) -> None:
    table = manifest([tree])
    (unit,) = plan(table)
    (tree / "several" / "net2.safetensors").unlink()
    save_file({"a.weight": torch.full((2, 2), float("nan"))}, tree / "several" / "net3.safetensors")
    rows = {Path(row["uri"]).name: row for row in embed_unit(encoder_of(), unit).to_pylist()}
    assert rows["net2.safetensors"]["error"] == f"{tree / 'several' / 'net2.safetensors'}: there is no such file"
    assert (
        rows["net3.safetensors"]["error"].startswith("tensor 'a.weight' has 4 NaN")
        and rows["net3.safetensors"]["vector"] is None
    )
    assert sum(row["error"] is None for row in rows.values()) == 5
    assert embed_unit(encoder_of(), unit, nonfinite="zero").column("error").null_count == 6


def test_names_of_layers_that_are_no_utf_8_are_escaped(tmp_path: Path) -> None:
    torch.save({"\ud800.0.weight": torch.ones(2, 2), "\ud800.1.weight": torch.ones(2, 2)}, tmp_path / "net.pt")
    (unit,) = plan(manifest([tmp_path / "net.pt"]))
    (row,) = embed_unit(encoder_of(), unit, layers=True).to_pylist()
    assert row["error"] is None and [layer["name"] for layer in row["layers"]] == ["\\ud800.0", "\\ud800.1"]


def test_an_unexpected_error_is_a_row_too(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = units_module.network_at

    def fails_at_one(uri: str) -> object:
        if uri.endswith("net1.safetensors"):
            raise RuntimeError("index 7 is out of bounds")
        return original(uri)

    monkeypatch.setattr(units_module, "network_at", fails_at_one)
    (unit,) = plan(manifest([tree]))
    for options in ({}, {"layers": True}):
        errors = embed_unit(encoder_of(), unit, **options)["error"]
        assert errors.null_count == 6
        assert "RuntimeError: index 7 is out of bounds, which is a bug" in str(errors.drop_null()[0])


def test_another_encoder_or_other_options_have_a_folder_of_their_own(tmp_path: Path) -> None:
    made = [
        EmbeddingDataset(tmp_path, encoder_of()).path,
        EmbeddingDataset(tmp_path, encoder_of()).path,
        EmbeddingDataset(tmp_path, encoder_of(), max_chunks=4, seed=1).path,
        EmbeddingDataset(tmp_path, Predictor(encoder_of())).path,
    ]
    assert made[0] == made[1] and len(set(made)) == 3
    said = json.loads((made[2] / "embedding.json").read_text())
    assert said["model"] == "SNE" and said["options"] == {"max_chunks": 4, "seed": 1}
    assert (
        json.loads((made[3] / "embedding.json").read_text())["preparation"]
        == Predictor(encoder_of()).preparation.config
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({path.name for path in made})
    with pytest.raises(ValueError, match="several encoders"):
        collect(tmp_path)


def test_a_damaged_part_is_named(tree: Path, tmp_path: Path) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    units = plan(manifest([tree]), budget=9000)
    list(embed_units(dataset, units))
    part = dataset.part(units[0])
    part.write_bytes(part.read_bytes()[:-20])
    for reading in (lambda: collect(dataset.path), lambda: dataset.failures(units)):
        with pytest.raises(ValueError, match=rf"{part.name}: is damaged .*; remove it and encode its networks again"):
            reading()
    part.unlink()
    assert len(list(embed_units(dataset, units))) == 1
    said = json.loads(pq.read_metadata(part).metadata[b"sne_fast"])
    assert said == json.loads((dataset.path / "embedding.json").read_text()) and len(said["weights_sha256"]) == 64
    assert collect(dataset.path).num_rows == 8


def test_what_other_units_have_done_is_not_done_again(tree: Path, tmp_path: Path) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of(), layers=True)
    before = plan(manifest([tree / "several", tree / "large.pt"]), budget=3000)
    list(embed_units(dataset, before))
    save_file(network(9), tree / "several" / "new.safetensors")
    save_file(network(10), tree / "several" / "net0.safetensors")
    after = plan(manifest([tree / "several", tree / "large.pt"]), budget=100_000)
    left = dataset.missing(after)
    assert [Path(n.uri).name for unit in left for n in unit.networks] == [
        "large.pt",
        "net0.safetensors",
        "new.safetensors",
    ]
    assert list(embed_units(dataset, after)) == left and list(embed_units(dataset, after)) == []
    with torch.no_grad():
        want = encoder_of()([tree / "several" / "net0.safetensors"])[0]
    rows = {Path(row["uri"]).name: row for row in collect(dataset.path).to_pylist()}
    torch.testing.assert_close(torch.tensor(rows["net0.safetensors"]["vector"]), want, rtol=0, atol=1e-5)
    assert len(rows) == 7


@pytest.mark.parametrize("budget", [3000, 100_000], ids=["split", "whole"])
def test_the_file_as_it_is_counts_also_where_an_old_one_came_back(tree: Path, tmp_path: Path, budget: int) -> None:
    file, encoder = tree / "large.pt", encoder_of()
    dataset = EmbeddingDataset(tmp_path / "out", encoder)
    old = (file.read_bytes(), file.stat().st_mtime_ns)
    first = manifest([file])
    list(embed_units(dataset, plan(first, budget=3000)))
    torch.save(network(9, width=40, depth=6), file)
    list(embed_units(dataset, plan(manifest([file]), budget=budget)))
    with torch.no_grad():
        new = encoder([file])[0]
        file.write_bytes(old[0])
        os.utime(file, ns=(old[1], old[1]))
        want = encoder([file])[0]
    assert list(embed_units(dataset, plan(manifest([file]), budget=3000))) == []
    for table, z in ((None, new), (first, want)):
        (row,) = collect(dataset.path, table=table).to_pylist()
        torch.testing.assert_close(torch.tensor(row["vector"]), z, rtol=0, atol=1e-5)


def test_what_failed_is_done_again_when_asked(tree: Path, tmp_path: Path) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    table = manifest([tree / "several", tree / "large.pt"])
    units = plan(table, budget=3000)
    list(embed_units(dataset, units, max_memory=1e6))  # less than one layer alone needs
    ((uri, said),) = dataset.failures(units).items()
    assert dataset.failures_of(units[0]) == {uri: said} and dataset.failures_of(units[-1]) == {}
    assert (
        uri == str(tree / "large.pt")
        and "encoding needs" in said
        and "encoding needs" in collect(dataset.path)["error"].to_pylist()[0]
    )
    assert list(embed_units(dataset, units, max_memory=1e12)) == []
    assert len(list(embed_units(dataset, units, max_memory=1e12, retry=True))) == 6
    assert dataset.failures(units) == {} and collect(dataset.path)["error"].null_count == 6
    list(embed_units(dataset, units, max_memory=1e6, retry=True))
    assert dataset.failures(units) == {}


@pytest.mark.parametrize("options", [{}, {"statistics": "relative"}], ids=["plain", "statistics"])
def test_split_networks_keep_layers_samples_and_narrow_dtypes(tree: Path, tmp_path: Path, options: dict) -> None:
    encoder = encoder_of(**options)
    table = manifest([tree / "large.pt"])
    rows = []
    for budget in (3000, 100_000):
        dataset = EmbeddingDataset(tmp_path / str(budget), encoder, layers=True, max_chunks=50)
        list(embed_units(dataset, plan(table, budget=budget)))
        rows += collect(dataset.path).to_pylist()
    assert rows[0]["spread"] > 0 and rows[0].pop("seconds") > 0 and rows[1].pop("seconds") > 0
    assert rows[0] == rows[1] and [layer["name"] for layer in rows[0]["layers"]] == [f"layers.{i}" for i in range(6)]
    narrow = EmbeddingDataset(tmp_path / "narrow", encoder.to(torch.bfloat16))
    list(embed_units(narrow, plan(table, budget=3000)))
    (row,) = collect(narrow.path).to_pylist()
    torch.testing.assert_close(torch.tensor(row["vector"]), encoder.encode(tree / "large.pt").float(), rtol=0, atol=0)


def test_a_run_of_layers_needs_the_memory_of_its_layers_alone(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"layers.0.weight": torch.ones(4, 4), "layers.1.weight": torch.ones(1024, 1024)}, file)
    small, large = plan(manifest([file]), budget=1000)
    errors = [embed_unit(encoder_of(), unit, max_memory=9e7)["error"][0].as_py() for unit in (small, large)]
    assert errors[0] is None and "for layer 'layers.1'" in errors[1]


def test_a_split_network_of_which_layers_are_missing_says_so(tree: Path, tmp_path: Path) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    units = plan(manifest([tree / "large.pt"]), budget=3000)
    list(embed_units(dataset, units[:4]))
    (row,) = collect(dataset.path).to_pylist()
    assert row["vector"] is None and row["error"] == "4 of its 6 layers are done"
