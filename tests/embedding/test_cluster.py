"""Units that the workers of a Dask cluster encode, and what happens when one dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from helpers import dying_workers
from helpers.command_line import call
from helpers.many_networks import encoder_of, network
from sne_fast.embedding import EmbeddingDataset, cluster, collect, embed_units, manifest, plan

pytest.importorskip("pyarrow")
dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked, to be fast")


@pytest.fixture(scope="module")
def dask_cluster() -> Iterator[Any]:
    """Start one worker with one thread, of a scheduler that gives a unit back at the first death."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed.nanny", "sne_fast.embedding.workers", "pyarrow.parquet"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distributed.utils._forkserver_preload_set", True, raising=False)
        options = {
            "distributed.worker.multiprocessing-method": "forkserver",
            "distributed.scheduler.allowed-failures": 0,
        }  # fmt: skip
        with (
            dask.config.set(options),
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit="2GiB", silence_logs=50
            ) as made,
        ):
            yield made


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of three networks, and a unit for each two of them."""
    monkeypatch.setattr("sne_fast.embedding.units.PACKED_WEIGHTS", 3 * 144)
    monkeypatch.setattr("sne_fast.embedding.units.LEAST", 6 * 144)


def many(folder: Path, count: int = 24) -> Path:
    folder.mkdir()
    for i in range(count):
        save_file(network(i), folder / f"net{i:02}.safetensors")
    return folder


@pytest.mark.usefixtures("small_units", "one_thread")
def test_a_worker_that_is_killed_costs_nothing(dask_cluster: Any, tmp_path: Path) -> None:
    table = manifest([many(tmp_path / "networks")])
    plain, dataset = (EmbeddingDataset(tmp_path / name, encoder_of()) for name in ("plain", "dask"))
    list(embed_units(plain, plan(table)))
    with distributed.Client(dask_cluster, set_as_default=False) as client:
        (before,) = client.run(os.getpid).values()
        encoding = iter(embed_units(dataset, plan(table), scheduler=client))
        next(encoding)
        os.kill(before, signal.SIGKILL)
        assert 1 + len(list(encoding)) == 4
        (after,) = client.run(os.getpid).values()
    assert after != before
    assert collect(dataset.path)["vector"].equals(collect(plain.path)["vector"])  # the same bits


@pytest.mark.usefixtures("small_units")
def test_a_network_that_kills_workers_is_recorded_and_no_other(
    dask_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = many(tmp_path / "networks", 5)
    save_file(network(7), folder / "kills.safetensors")
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    monkeypatch.setattr(cluster, "_encode", dying_workers.dies_on_the_cluster)
    list(embed_units(dataset, plan(manifest([folder])), scheduler=dask_cluster.scheduler_address))
    rows = {Path(row["uri"]).name: row["error"] for row in collect(dataset.path).to_pylist()}
    assert "died 3 times, perhaps for lack of memory" in rows.pop("kills.safetensors")
    assert len(rows) == 5 and set(rows.values()) == {None}


def test_the_command_uses_a_cluster_and_names_what_failed(dask_cluster: Any, tree: Path, tmp_path: Path) -> None:
    options = ["--layers", "-o", tmp_path / "out", "--scheduler", dask_cluster.scheduler_address]
    result = call("encode", tree, *options)
    assert result.exit_code == 1 and "damaged.safetensors: is damaged" in " ".join(result.stderr.split())
    assert "7 networks are done" in " ".join(result.stdout.split())


def test_a_worker_s_limit_of_memory_is_kept(dask_cluster: Any, tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    save_file({"layer.weight": network(0, width=4096, depth=1)["layers.0.weight"]}, file)
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of(), layers=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_encode", dying_workers.has_little_memory)
        list(embed_units(dataset, plan(manifest([file])), scheduler=dask_cluster.scheduler_address))
    assert "encoding needs" in collect(dataset.path)["error"][0].as_py()


def test_a_scheduler_that_is_not_there_is_named(tree: Path, tmp_path: Path) -> None:
    dataset = EmbeddingDataset(tmp_path / "out", encoder_of())
    soon = dask.config.set({"distributed.comm.timeouts.connect": "200ms"})
    with soon, pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        list(embed_units(dataset, plan(manifest([tree])), scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(ValueError, match="workers= or scheduler=, not both"):
        embed_units(dataset, [], workers=2, scheduler="tcp://127.0.0.1:9")
