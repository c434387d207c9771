"""Encode a large checkpoint of random weights, and measure memory and time: `bench/large_checkpoint.py --help`.

The checkpoint has the names and shapes of a Llama, in bfloat16, in shards with an index. It is encoded by
`sne-fast encode` in a process of its own, which tells its peak of resident memory, and the system its processor time.
The rate of the chunk stage alone is measured on one matrix in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import sne_fast
from sne_fast.reports.machine import machine

SIZES = {  # hidden, intermediate, layers, key-value width, vocabulary
    "0.1B": (768, 2048, 12, 256, 32000),
    "1.6B": (2048, 5632, 32, 512, 32000),
    "7B": (4096, 11008, 32, 4096, 32000),
}
SHARD = 2 * 2**30
CHILD = """
import sys
from pathlib import Path
from sne_fast.benchmark.memory import peak_bytes
from sne_fast.cli.commands import main
peak = Path(sys.argv.pop(1))
try:
    main()
finally:
    peak.write_text(str(peak_bytes()))
"""


def tensors(size: str) -> dict[str, tuple[int, ...]]:
    hidden, wide, layers, narrow, vocabulary = SIZES[size]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        start = f"model.layers.{i}."
        found |= {
            f"{start}input_layernorm.weight": (hidden,),
            f"{start}self_attn.q_proj.weight": (hidden, hidden),
            f"{start}self_attn.k_proj.weight": (narrow, hidden),
            f"{start}self_attn.v_proj.weight": (narrow, hidden),
            f"{start}self_attn.o_proj.weight": (hidden, hidden),
            f"{start}post_attention_layernorm.weight": (hidden,),
            f"{start}mlp.gate_proj.weight": (wide, hidden),
            f"{start}mlp.up_proj.weight": (wide, hidden),
            f"{start}mlp.down_proj.weight": (hidden, wide),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make(folder: Path, size: str) -> int:
    """Write the checkpoint where it is not there yet; return its number of weights."""
    shapes = tensors(size)
    weights = sum(torch.Size(shape).numel() for shape in shapes.values())
    if (folder / "model.safetensors.index.json").exists():
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        number = torch.Size(shape).numel()
        if held and held + 2 * number > SHARD:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += 2 * number
    index = {}
    torch.manual_seed(0)
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        made = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in group.items()}
        save_file(made, folder / file)
        index |= dict.fromkeys(group, file)
    text = json.dumps({"metadata": {"total_size": 2 * weights}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return weights


def rate_of_chunk_stage(repeats: int) -> float:
    """Return the weights per second of processor time of the chunk stage, on one matrix of 2 M weights; the median."""
    torch.manual_seed(0)
    encoder = sne_fast.SNE(set_attention="isab").eval()
    batch = encoder.pack([{"layer.weight": 0.02 * torch.randn(1024, 2048)}])
    code = torch.zeros(1, encoder.hidden_dim)
    assert encoder.chunk_encoder is not None
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.process_time()
            encoder.chunk_encoder(batch, code)
            seconds.append(time.process_time() - start)
    return batch.num_weights / sorted(seconds[1:])[repeats // 2]


def encode(folder: Path, max_chunks: int | None, threads: int) -> dict[str, float]:
    """Run `sne-fast encode` on the checkpoint; return wall and processor seconds, peak memory in bytes, and spread."""
    out, peak = folder / "z.npz", folder / "peak.txt"
    command = [sys.executable, "-c", CHILD, str(peak), "encode", str(folder), "-o", str(out)]
    if max_chunks is not None:
        command += ["--max-chunks", str(max_chunks)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"wall_seconds": wall, "cpu_seconds": cpu, "peak_bytes": float(peak.read_text())}
    with np.load(out) as stored:
        if "spread" in stored:
            found["spread"] = float(stored["spread"][0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--folder", type=Path, required=True, help="Folder of the checkpoint, made if it is not there.")
    parser.add_argument("--max-chunks", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--remove", action="store_true", help="Remove the checkpoint afterwards.")
    parser.add_argument("--out", type=Path, help="JSON file, to which the result is added.")
    given = parser.parse_args()
    weights = make(given.folder, given.size)
    torch.set_num_threads(1)
    result = {
        "size": given.size, "weights": weights, "max_chunks": given.max_chunks, "threads": given.threads,
        "chunk_stage_weights_per_cpu_second": rate_of_chunk_stage(5),
        **encode(given.folder, given.max_chunks, given.threads),
    }  # fmt: skip
    result["weights_per_cpu_second"] = weights / result["cpu_seconds"]
    if given.remove:
        shutil.rmtree(given.folder)
    print(json.dumps(result, indent=2))
    if given.out is not None:
        runs = json.loads(given.out.read_text()) if given.out.exists() else []
        given.out.write_text(json.dumps([*runs, {**result, **machine()}], indent=2) + "\n")


if __name__ == "__main__":
    main()
