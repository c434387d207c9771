"""Many networks: manifests from headers, units of equal work, datasets that resume, and processes that die."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file

from helpers import dying_workers
from helpers.command_line import call
from sne_fast import SNE, Predictor
from sne_fast.embedding import EmbeddingDataset, collect, cut_for, embed_unit, embed_units, manifest, plan
from sne_fast.embedding import running as running_module
from sne_fast.embedding import units as units_module
from sne_fast.embedding.manifests import etag_of

pa = pytest.importorskip("pyarrow")
FORKS = pytest.mark.skipif(sys.platform != "linux", reason="processes that die are forked, to be fast")


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
    assert len(units[-1].networks) == 6 and len({unit.id for unit in units}) == len(units)
    shuffled = table.take(list(reversed(range(table.num_rows))))
    assert [unit.id for unit in plan(shuffled, budget=3000)] == [unit.id for unit in units]
    assert [unit.layers for unit in plan(table, budget=3000, split=False)] == [None, None]
    assert [len(unit.networks) for unit in plan(table)] == [7]


def test_several_processes_have_several_units_each(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unit,) = plan(manifest([tree]))
    assert cut_for([unit], 4) == [unit] == cut_for([unit], 1)  # which is not worth it
    monkeypatch.setattr("sne_fast.embedding.units.LEAST", 300)
    parts = cut_for([unit], 4)
    assert [len(part.networks) for part in parts] == [1, 2, 2, 2]
    assert tuple(network for part in parts for network in part.networks) == unit.networks


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
    assert rows["net2.safetensors"]["error"] == f"{tree / 'several' / 'net2.safetensors'}: there is no such file"
    assert (
        rows["net3.safetensors"]["error"].startswith("tensor 'a.weight' has 4 NaN")
        and rows["net3.safetensors"]["vector"] is None
    )
    assert sum(row["error"] is None for row in rows.values()) == 5
    assert embed_unit(encoder_of(), unit, nonfinite="zero").column("error").null_count == 6


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
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({path.name for path in made})
    with pytest.raises(ValueError, match="several encoders"):
        collect(tmp_path)


def test_processes_that_make_one_dataset_at_once_find_one_model(tmp_path: Path) -> None:
    encoder = encoder_of()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: EmbeddingDataset(tmp_path, encoder).path, range(8)))
    assert len(set(made)) == 1 and [path.name for path in tmp_path.iterdir()] == [made[0].name]
    assert sorted(path.name for path in made[0].iterdir()) == ["embedding.json", "model"]
    assert torch.equal(SNE.from_pretrained(made[0] / "model").type_embedding.weight, encoder.type_embedding.weight)


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
    assert len(list(embed_units(dataset, units))) == 1 and collect(dataset.path).num_rows == 7


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


def test_a_process_of_its_own_loads_the_encoder(tree: Path, tmp_path: Path) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    (unit,) = plan(manifest([tree / "one"]))  # one unit starts one process
    assert list(embed_units(dataset, [unit], workers=2)) == [unit]
    want = embed_unit(encoder_of(), unit)["vector"]
    assert collect(dataset.path)["vector"].equals(want)


@FORKS
def test_processes_share_the_work_and_one_that_dies_is_tried_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    units = plan(manifest([tree]), budget=3000)
    monkeypatch.setattr(running_module, "_embed", dying_workers.dies_on_the_first_call)
    monkeypatch.setattr(running_module, "START", "fork")  # in which nothing is imported again
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    assert {unit.id for unit in embed_units(dataset, units, workers=2)} == {unit.id for unit in units}
    assert (tmp_path / "died").exists()
    assert collect(dataset.path).column("error").null_count == 7


@FORKS
def test_a_network_that_kills_its_processes_is_recorded_and_no_other(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    table = manifest([tree])
    units = [*plan(table, budget=9000, split=False), *plan(manifest([tree / "large.pt", tree / "one"]))]
    assert [len(unit.networks) for unit in units] == [1, 6, 2]
    monkeypatch.setattr(running_module, "_embed", dying_workers.dies_on_large_networks)
    monkeypatch.setattr(running_module, "START", "fork")
    done = list(embed_units(dataset, units[1:], workers=2))
    assert sum(len(unit.networks) for unit in done) == 8
    rows = {Path(row["uri"]).name: row for row in collect(dataset.path).to_pylist()}
    assert "died 3 times" in rows.pop("large.pt")["error"]
    assert len(rows) == 6 and all(row["error"] is None for row in rows.values())
    assert dataset.missing(units) == [] and dataset.missing(units[:2], retry=True) == units[:1]


@FORKS
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "id"
    target = dying_workers.starts_a_worker_and_is_killed
    parent = multiprocessing.get_context("fork").Process(target=target, args=(str(file),))
    parent.start()
    parent.join()
    assert parent.exitcode == -9
    worker = f"/proc/{file.read_text()}/stat"
    for _ in range(500):
        if not os.path.exists(worker) or Path(worker).read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    os.kill(int(file.read_text()), 9)
    pytest.fail("the worker goes on")


# --------------------------------------------------------------------------------------------------------- command line


def test_encode_to_a_folder_resumes_and_records_failures(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    first = call("encode", tree, "-o", out)
    assert first.exit_code == 1 and "7 networks are done" in " ".join(first.stdout.split())
    assert f"sne-fast: {tree / 'damaged.safetensors'}: is damaged" in " ".join(first.stderr.split())
    (tree / "damaged.safetensors").unlink()
    again = call("encode", tree, "-o", out)
    assert again.exit_code == 0 and "0 of them by this call" in " ".join(again.stdout.split())
    save_file(network(3), tree / "new.safetensors")
    more = call("encode", tree, "-o", out)
    assert more.exit_code == 0 and collect(out).num_rows == 8
    assert "8 networks are done" in " ".join(more.stdout.split()) and "1 of them by this call" in more.stdout
    torch.manual_seed(0)
    with torch.no_grad():
        want = SNE(set_attention="isab")([tree / "one"])[0]
    rows = {Path(row["uri"]).name: row["vector"] for row in collect(out).to_pylist()}
    torch.testing.assert_close(torch.tensor(rows["one"]), want, rtol=0, atol=1e-5)


def test_failures_are_encoded_again_with_retry(tree: Path, tmp_path: Path) -> None:
    (tree / "damaged.safetensors").unlink()
    out = tmp_path / "vectors"
    first = call("encode", tree / "large.pt", "--layers", "-o", out, "--max-memory", "1M")
    said = " ".join(first.stderr.split())
    assert first.exit_code == 1 and "encoding needs" in said and "1 of 1 networks failed" in said
    assert "0 networks are done" in " ".join(first.stdout.split())
    assert call("encode", tree / "large.pt", "--layers", "-o", out).exit_code == 1
    again = call("encode", tree / "large.pt", "--layers", "-o", out, "--retry")
    assert again.exit_code == 0 and "1 of them by this call" in " ".join(again.stdout.split())


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
        (["-o", tmp_path / "z.npz", "--retry"], "need a folder as --out"),
        (["-o", tmp_path / "z", "--shard", "3/3"], "--shard must be i/n"),
        (["-o", tmp_path / "z.csv"], "must end in .npz or .parquet, or be a folder"),
        (["-o", tmp_path / "z", "--on-error", "stop"], "damaged.safetensors"),
    ):
        result = call("encode", tree, *options)
        assert result.exit_code == 2 and said in " ".join(result.stderr.split())
