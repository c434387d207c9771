"""Manifests from headers alone, and units of equal work."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file

from helpers.many_networks import network
from sne_fast.embedding import cut_for, manifest, plan
from sne_fast.embedding.manifests import etag_of

pytest.importorskip("pyarrow")


def test_a_manifest_has_a_row_for_every_network_and_says_which_cannot_be_read(tree: Path, tmp_path: Path) -> None:
    table = manifest([tree])
    rows = {Path(row["uri"]).name: row for row in table.to_pylist()}
    assert sorted(rows) == ["damaged.safetensors", "large.pt", *(f"net{i}.safetensors" for i in range(5)), "one"]
    assert rows["damaged.safetensors"]["error"].startswith(f"{tree / 'damaged.safetensors'}: is damaged or no")
    assert rows["net0.safetensors"]["layer_weights"] == [72, 72] and rows["large.pt"]["weights"] == 6 * 1640
    listing = tmp_path / "list.txt"
    listing.write_text(f"{tree / 'large.pt'}\n\n{tree / 'several'}\n")
    assert manifest([f"@{listing}", tree / "large.pt"]).num_rows == 6
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "manifest.parquet")
    assert manifest([tmp_path / "manifest.parquet"]).equals(table)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        manifest([tmp_path / "absent"])
    before = rows["large.pt"]["etag"]
    os.utime(tree / "large.pt", (1, 1))
    assert manifest([tree / "large.pt"]).to_pylist()[0]["etag"] != before


def test_folders_are_found_as_they_are_read_and_none_is_dropped(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for name in ("pipe/unet", "pipe/vae", "mixed", "parts/0_Transformer", "deep/inside"):
        (root / name).mkdir(parents=True)
        save_file(network(0), root / name / "diffusion_pytorch_model.safetensors")
    (root / "pipe" / "model_index.json").write_text(json.dumps({"unet": ["a", "UNet"], "vae": ["a", "VAE"]}))
    for name in ("a.safetensors", "b.safetensors"):
        save_file(network(1), root / "mixed" / name)
    torch.save(network(1), root / "mixed" / "a.pt")  # is it a.safetensors in another format?
    modules = [{"idx": 0, "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (root / "parts" / "modules.json").write_text(json.dumps(modules))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save(network(2), checkpoint_id=root / "sharded")
    rows = {Path(row["uri"]).relative_to(root).as_posix(): row["error"] for row in manifest([root]).to_pylist()}
    assert sorted(rows) == ["deep/inside", "mixed", "parts", "pipe/unet", "pipe/vae", "sharded"]
    assert "holds several checkpoints" in rows.pop("mixed") and set(rows.values()) == {None}
    (row,) = manifest([root / "pipe"], key="vae").to_pylist()
    assert row["uri"] == str(root / "pipe") and row["weights"] == 144
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "weight.npy", np.ones((3, 4), np.float32))
    assert manifest([root / "sharded", tmp_path / "arrays"]).column("weights").to_pylist() == [144, 12]


def test_an_etag_changes_with_every_file_that_is_read(tmp_path: Path) -> None:
    parts = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, part in enumerate(parts):
        save_file({f"layers.{i}.weight": torch.ones(4, 4)}, part)
        os.utime(part, (9 + i, 9 + i))
    seen = set()
    for change in (lambda: None, lambda: os.utime(parts[0], (5, 5)), (tmp_path / "config.json").touch):
        change()
        seen |= {etag_of(str(tmp_path)), etag_of(str(parts[0]))}
    save_file(network(0), tmp_path / "one.safetensors")
    seen.add(etag_of(str(tmp_path / "one.safetensors")))
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    seen.add(etag_of(str(tmp_path / "one.safetensors")))
    assert len(seen) == 5  # three of the folder, which are those of its part too


def test_units_hold_every_layer_once_and_their_names_depend_on_content_alone(tree: Path) -> None:
    table = manifest([tree])
    units = plan(table, budget=3000)
    assert [unit.layers for unit in units] == [(0, 1, 6), (1, 2, 6), (2, 3, 6), (3, 4, 6), (4, 5, 6), (5, 6, 6), None]
    assert len(units[-1].networks) == 7 and len({unit.id for unit in units}) == len(units)
    shuffled = table.take(list(reversed(range(table.num_rows))))
    assert [unit.id for unit in plan(shuffled, budget=3000)] == [unit.id for unit in units]
    assert [unit.layers for unit in plan(table, budget=3000, split=False)] == [None, None]
    assert [len(unit.networks) for unit in plan(table)] == [8] and sum(unit.weights for unit in units) == 6 * 1640 + 864


def test_several_processes_have_several_units_each(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sne_fast.embedding.units.PACKED_WEIGHTS", 150)
    (unit,) = plan(manifest([tree]))
    assert cut_for([unit], 4) == [unit] == cut_for([unit], 1)  # which is not worth it
    monkeypatch.setattr("sne_fast.embedding.units.LEAST", 300)
    parts = cut_for([unit], 4)
    assert [len(part.networks) for part in parts] == [1, 2, 2, 3]  # the last with the one that cannot be read
    assert tuple(pack for part in parts for pack in part.packs) == unit.packs  # what is encoded in one call stays so
    assert tuple(network for part in parts for network in part.networks) == unit.networks
