"""Checks an installed wheel: python scripts/try_wheel.py, outside of the repository.

Encodes two networks on the CPU backend, checks that the package is the installed one and that the process has one
OpenMP runtime, and prints what was found.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

import sne_fast

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    package = Path(sne_fast.__file__).resolve().parent
    assert not package.is_relative_to(ROOT), f"{package} is the source tree: run this elsewhere, without PYTHONPATH"
    networks = [
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)),
        torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 10)),
    ]
    encoder = sne_fast.SNE(hidden_dim=64)
    batch = encoder.pack(networks)
    with torch.no_grad():
        with sne_fast.use_backend("cpu"):  # raises where the library is missing or does not load
            z = encoder(batch)
        with sne_fast.use_backend("reference"):
            expected = encoder(batch)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
    maps = Path("/proc/self/maps")
    runtimes = set(re.findall(r"\S*/lib[gi]?omp\S*", maps.read_text())) if maps.exists() else set()
    ours = {path for path in runtimes if "sne_fast" in path}
    assert not ours and len(runtimes) <= 1, f"more than one OpenMP runtime: {sorted(runtimes)}"
    print(f"sne_fast {sne_fast.__version__} in {package} gives {tuple(z.shape)}")
    print(f"torch {torch.__version__}, OpenMP runtime {', '.join(runtimes) or 'not found'}")


if __name__ == "__main__":
    main()
