"""Encode many checkpoints with processes that are killed, and check every vector: `bench/many_networks.py --help`.

Checkpoints of 1,000 to 2,000 random weights are made, five of them damaged. They are encoded by a plain loop; by
`sne-fast encode --workers`, undisturbed; by the same, killed twice at random times with all its processes and started
again; and by a Dask cluster one of whose workers is killed by signal 9. Every network must be there exactly once, with
the same bits in the last three, and five rows must have an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

import sne_fast
from sne_fast.embedding import collect
from sne_fast.reports.machine import machine

DAMAGED = 5
PROGRAM = [sys.executable, "-m", "sne_fast"]


def make(folder: Path, count: int) -> int:
    """Write the checkpoints where they are not there yet; return the number of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = 0
    for i in range(count):
        width, depth = 16 + i % 5, 4 + i % 2
        weights += depth * (width * width + width)
        path = folder / f"network{i:06}.safetensors"
        if path.exists():
            continue
        shapes = {"weight": (width, width), "bias": (width,)}
        state = {
            f"layers.{k}.{name}": torch.randn(shape, generator=generator)
            for k in range(depth)
            for name, shape in shapes.items()
        }
        save_file(state, path)
    damage(folder, count)
    return weights


def damage(folder: Path, count: int) -> None:
    """Damage five files, each in another way."""
    cut, empty, text, header, values = (folder / f"network{i * count // DAMAGED + 3:06}.safetensors" for i in range(5))
    cut.write_bytes(cut.read_bytes()[:1000])
    empty.write_bytes(b"")
    text.write_text("this is no checkpoint")
    header.write_bytes(b"\xff" * 8 + header.read_bytes()[8:])
    save_file({"layers.0.weight": torch.full((16, 16), float("nan"))}, values)


def plain_loop(folder: Path) -> dict[str, torch.Tensor]:
    """Encode one file after another."""
    torch.manual_seed(0)
    encoder = sne_fast.SNE(set_attention="isab").eval()  # that of `sne-fast encode` without --model
    found = {}
    with torch.no_grad():
        for path in sorted(folder.iterdir()):
            try:
                found[str(path)] = encoder([path])[0]
            except ValueError:
                continue
    return found


def start(folder: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """Start the program in a process group of its own."""
    command = [*PROGRAM, "encode", str(folder), "-o", str(out), *options]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run; its exit code must say that some networks failed."""
    out, err = process.communicate()
    print(err, end="")
    assert process.returncode == 1, f"exit code {process.returncode}, not 1: {err}"
    assert f"{DAMAGED} of " in err, err
    return out


def killed(folder: Path, out: Path, workers: int, seconds: float) -> list[dict[str, float]]:
    """Kill two runs at random times, and let a third end."""
    draw = random.Random(0)
    runs = []
    for _ in range(2):
        begun = time.perf_counter()
        process = start(folder, out, "--workers", str(workers))
        time.sleep(seconds * draw.uniform(0.3, 0.7))
        assert process.poll() is None, "it ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done = sum(len(pq.read_table(file, columns=["uri"])) for file in out.glob("*/part-*.parquet"))
        runs.append({"wall_seconds": time.perf_counter() - begun, "networks_done_when_killed": done})
    begun = time.perf_counter()
    finish(start(folder, out, "--workers", str(workers)))
    return [*runs, {"wall_seconds": time.perf_counter() - begun}]


def on_dask(folder: Path, out: Path, workers: int) -> None:
    """Encode on a local Dask cluster, one of whose workers is killed when the first results are there."""
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster:
        process = start(folder, out, "--scheduler", cluster.scheduler_address)
        while not list(out.glob("*/part-*.parquet")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        with Client(cluster) as client:
            before = client.run(os.getpid)
            os.kill(next(iter(before.values())), signal.SIGKILL)
        finish(process)
        with Client(cluster) as client:
            assert client.run(os.getpid) != before, "no worker was started again"


def vectors(out: Path, count: int) -> dict[str, list[float]]:
    """Return the vectors of a run; every network must have been written once, and five with an error."""
    rows = collect(out)
    assert rows.num_rows == count and rows["error"].null_count == count - DAMAGED
    written = Counter[str]()
    for file in out.glob("*/part-*.parquet"):
        written.update(pq.read_table(file, columns=["uri"])["uri"].to_pylist())
    assert len(written) == count and set(written.values()) == {1}, written.most_common(3)
    return {row["uri"]: row["vector"] for row in rows.to_pylist() if row["error"] is None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Folder of checkpoints and results, new or empty.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--note", default="", help="A sentence on the machine, such as that other work ran there.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.workers)  # one for each worker
    torch.set_num_threads(1)
    networks = given.folder / "networks"
    weights = make(networks, given.count)
    result = {"networks": given.count, "damaged": DAMAGED, "weights": weights, "workers": given.workers}

    begun, cpu = time.perf_counter(), time.process_time()
    alone = plain_loop(networks)
    result["plain_loop"] = {
        "wall_seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip

    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    finish(start(networks, given.folder / "undisturbed", "--workers", str(given.workers)))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.perf_counter() - begun
    result["undisturbed"] = {
        "wall_seconds": wall, "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }  # fmt: skip
    want = vectors(given.folder / "undisturbed", given.count)
    difference = max(float((torch.tensor(want[uri]) - z).abs().max()) for uri, z in alone.items())
    result["largest_difference_from_plain_loop"] = difference
    assert want.keys() == alone.keys() and difference < 1e-5

    result["killed_twice"] = killed(networks, given.folder / "killed", given.workers, wall)
    assert vectors(given.folder / "killed", given.count) == want

    begun = time.perf_counter()
    on_dask(networks, given.folder / "dask", given.workers)
    result["dask_with_a_worker_killed"] = {"wall_seconds": time.perf_counter() - begun}
    assert vectors(given.folder / "dask", given.count) == want
    result["same_bits"] = True
    result["machine"] = {**machine(), "load_average": os.getloadavg()[0], "note": given.note}
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
