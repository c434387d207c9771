"""Several processes that encode networks, and what happens when one dies."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers import dying_workers
from helpers.many_networks import encoder_of
from sne_fast import SNE
from sne_fast.embedding import EmbeddingDataset, collect, embed_unit, embed_units, manifest, plan, processes

pytest.importorskip("pyarrow")
FORKS = pytest.mark.skipif(sys.platform != "linux", reason="processes that die are forked, to be fast")


def test_processes_that_make_one_dataset_at_once_find_one_model(tmp_path: Path) -> None:
    encoder = encoder_of()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: EmbeddingDataset(tmp_path, encoder).path, range(8)))
    assert len(set(made)) == 1 and [path.name for path in tmp_path.iterdir()] == [made[0].name]
    assert sorted(path.name for path in made[0].iterdir()) == ["embedding.json", "model"]
    assert torch.equal(SNE.from_pretrained(made[0] / "model").type_embedding.weight, encoder.type_embedding.weight)


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
    monkeypatch.setattr(processes, "encode", dying_workers.dies_on_the_first_call)
    monkeypatch.setattr(processes, "START", "fork")  # in which nothing is imported again
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    assert {unit.id for unit in embed_units(dataset, units, workers=2)} == {unit.id for unit in units}
    assert (tmp_path / "died").exists()
    assert collect(dataset.path, table=manifest([tree])).column("error").null_count == 7


@FORKS
def test_a_network_that_kills_its_processes_is_recorded_and_no_other(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    table = manifest([tree])
    units = [*plan(table, budget=9000, split=False), *plan(manifest([tree / "large.pt", tree / "one"]))]
    assert [len(unit.networks) for unit in units] == [1, 7, 2]
    monkeypatch.setattr(processes, "encode", dying_workers.dies_on_large_networks)
    monkeypatch.setattr(processes, "START", "fork")
    done = list(embed_units(dataset, units[1:], workers=2))
    assert sum(len(unit.networks) for unit in done) == 9
    rows = {Path(row["uri"]).name: row for row in collect(dataset.path).to_pylist()}
    assert "died 3 times" in rows.pop("large.pt")["error"]
    assert "is damaged" in rows.pop("damaged.safetensors")["error"]
    assert len(rows) == 6 and all(row["error"] is None for row in rows.values())
    assert dataset.missing(units) == [] and dataset.missing(units[:2], retry=True)[0] == units[0]


@FORKS
def test_a_process_that_does_not_begin_ends_the_work(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    monkeypatch.setattr(processes, "serve", lambda *given: os._exit(3))
    monkeypatch.setattr(processes, "START", "fork")
    with pytest.raises(ChildProcessError, match=r"exit code 3 before it began; a script must .* `if __name__ =="):
        list(embed_units(dataset, plan(manifest([tree])), workers=2))


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
