"""Many networks: manifests from headers, units of equal work, datasets that resume, and processes that die."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import dying_workers
from helpers.command_line import call
from sne_fast import SNE, Predictor
from sne_fast.embedding import EmbeddingDataset, collect, embed_unit, embed_units, manifest, plan
from sne_fast.embedding import running as running_module

pa = pytest.importorskip("pyarrow")


def network(seed: int, width: int = 8, depth: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i in range(depth):
        state[f"layers.{i}.weight"] = torch.randn(width, width, generator=generator)
        state[f"layers.{i}.bias"] = torch.randn(width, generator=generator)
    return state


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files, a folder of several, a folder of one with its configuration, a damaged file, and a larger network."""
    root = tmp_path / "tree"
    (root / "several").mkdir(parents=True)
    (root / "one").mkdir()
    for i in range(5):
        save_file(network(i), root / "several" / f"net{i}.safetensors")
    save_file(network(7), root / "one" / "model.safetensors")
    (root / "one" / "config.json").write_text("{}")
    torch.save(network(8, width=40, depth=6), root / "large.pt")
    (root / "damaged.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    return root


def encoder_of(**options: object) -> SNE:
    torch.manual_seed(0)
    return SNE(hidden_dim=16, num_heads=2, chunk_size=8, set_attention="isab", **options).eval()  # type: ignore[arg-type]


def test_a_manifest_has_a_row_for_every_network_and_says_which_cannot_be_read(tree: Path, tmp_path: Path) -> None:
    table = manifest([tree])
    rows = {Path(row["uri"]).name: row for row in table.to_pylist()}
    assert sorted(rows) == ["damaged.safetensors", "large.pt", *(f"net{i}.safetensors" for i in range(5)), "one"]
    assert "damaged.safetensors: is damaged or no safetensors file" in rows["damaged.safetensors"]["error"]
    assert rows["net0.safetensors"]["layer_weights"] == [72, 72] and rows["large.pt"]["weights"] == 6 * 1640
    listing = tmp_path / "list.txt"
    listing.write_text(f"{tree / 'large.pt'}\n\n{tree / 'several'}\n")
    assert manifest([f"@{listing}"]).num_rows == 6
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "manifest.parquet")
    assert manifest([tmp_path / "manifest.parquet"]).equals(table)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        manifest([tmp_path / "absent"])
    before = rows["large.pt"]["etag"]
    os.utime(tree / "large.pt", (1, 1))
    assert manifest([tree / "large.pt"]).to_pylist()[0]["etag"] != before


def test_units_hold_every_layer_once_and_their_names_depend_on_content_alone(tree: Path) -> None:
    table = manifest([tree])
    units = plan(table, budget=3000)
    assert [unit.layers for unit in units] == [(0, 1, 6), (1, 2, 6), (2, 3, 6), (3, 4, 6), (4, 5, 6), (5, 6, 6), None]
    assert len(units[-1].networks) == 6 and len({unit.id for unit in units}) == len(units)
    shuffled = table.take(list(reversed(range(table.num_rows))))
    assert [unit.id for unit in plan(shuffled, budget=3000)] == [unit.id for unit in units]
    assert [unit.layers for unit in plan(table, budget=3000, split=False)] == [None, None]
    assert [len(unit.networks) for unit in plan(table)] == [7]


@pytest.mark.parametrize("options", [{}, {"statistics": "relative"}], ids=["plain", "statistics"])
def test_the_vectors_are_those_of_the_encoder(tree: Path, tmp_path: Path, options: dict) -> None:
    encoder = encoder_of(**options)
    dataset = EmbeddingDataset(tmp_path / "out", encoder, layers=True)
    units = plan(manifest([tree]), budget=3000)
    assert list(embed_units(dataset, units)) == units and list(embed_units(dataset, units)) == []
    rows = {row["uri"]: row for row in collect(tmp_path / "out").to_pylist()}
    assert len(rows) == 7
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
    assert "there is no such file" in rows["net2.safetensors"]["error"]
    assert "'a.weight' has 4 NaN" in rows["net3.safetensors"]["error"] and rows["net3.safetensors"]["vector"] is None
    assert sum(row["error"] is None for row in rows.values()) == 5
    assert embed_unit(encoder_of(), unit, nonfinite="zero").column("error").null_count == 6


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
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({path.name for path in made})
    with pytest.raises(ValueError, match="several encoders"):
        collect(tmp_path)


def test_a_split_network_of_which_layers_are_missing_says_so(tree: Path, tmp_path: Path) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    units = plan(manifest([tree / "large.pt"]), budget=3000)
    list(embed_units(dataset, units[:4]))
    (row,) = collect(dataset.path).to_pylist()
    assert row["vector"] is None and row["error"] == "4 of its 6 layers are done"


def test_processes_share_the_work_and_one_that_dies_is_tried_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    units = plan(manifest([tree]), budget=3000)
    monkeypatch.setattr(running_module, "_embed", dying_workers.dies_on_the_first_call)
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    assert {unit.id for unit in embed_units(dataset, units, workers=2)} == {unit.id for unit in units}
    assert (tmp_path / "died").exists()
    assert collect(dataset.path).column("error").null_count == 7


def test_a_network_that_kills_its_process_three_times_is_recorded(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    units = plan(manifest([tree / "large.pt", tree / "one"]), budget=9000, split=False)
    monkeypatch.setattr(running_module, "_embed", dying_workers.dies_on_large_networks)
    assert len(list(embed_units(dataset, units, workers=2))) == 2
    rows = {Path(row["uri"]).name: row for row in collect(dataset.path).to_pylist()}
    assert "died 3 times" in rows["large.pt"]["error"]


# --------------------------------------------------------------------------------------------------------- command line


def test_encode_to_a_folder_resumes_and_records_failures(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    first = call("encode", tree, "-o", out)
    assert first.exit_code == 1 and "7 networks are done" in " ".join(first.stdout.split())
    assert "damaged.safetensors: is damaged" in " ".join(first.stderr.split())
    (tree / "damaged.safetensors").unlink()
    again = call("encode", tree, "-o", out)
    assert again.exit_code == 0 and "0 of them by this call" in " ".join(again.stdout.split())
    save_file(network(3), tree / "new.safetensors")
    more = call("encode", tree, "-o", out)
    assert more.exit_code == 0 and collect(out).num_rows == 8
    torch.manual_seed(0)
    with torch.no_grad():
        want = SNE(set_attention="isab")([tree / "one"])[0]
    rows = {Path(row["uri"]).name: row["vector"] for row in collect(out).to_pylist()}
    torch.testing.assert_close(torch.tensor(rows["one"]), want, rtol=0, atol=1e-5)


def test_shares_together_are_the_whole(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sne_fast.embedding.units.MOST", 2)
    (tree / "damaged.safetensors").unlink()
    for i in range(3):
        assert call("encode", tree, "-o", tmp_path / "vectors", "--shard", f"{i}/3").exit_code == 0
    assert collect(tmp_path / "vectors").column("error").null_count == 7
    assert "0 of them by this call" in " ".join(call("encode", tree, "-o", tmp_path / "vectors").stdout.split())


def test_bad_options_of_folders_are_refused(tree: Path, tmp_path: Path) -> None:
    for options, said in (
        (["-o", tmp_path / "z.npz", "--workers", 2], "need a folder as --out"),
        (["-o", tmp_path / "z", "--shard", "3/3"], "--shard must be i/n"),
        (["-o", tmp_path / "z.csv"], "must end in .npz or .parquet, or be a folder"),
        (["-o", tmp_path / "z", "--on-error", "stop"], "damaged.safetensors"),
    ):
        result = call("encode", tree, *options)
        assert result.exit_code == 2 and said in " ".join(result.stderr.split())
