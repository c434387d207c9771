"""Encode every checkpoint of a folder to one vector each, and find the nearest neighbour of each network.

python examples/encode_folder.py [FOLDER [ENCODER]]

ENCODER is a folder that `save_pretrained` wrote, by default `sne-small`, which comes with the package and is trained to
find networks that are alike. Without FOLDER, a few networks are made in a temporary one. The command `sne-fast encode`
does the same for single files and zoos.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import sne_fast
from sne_fast.data.checkpoints import save_state_dict

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
BATCH_WEIGHTS = 200_000


def make_checkpoints(folder: Path) -> None:
    """Write three networks, and a copy of the first with a little noise."""
    torch.manual_seed(0)
    networks = {
        "mlp": nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)),
        "cnn": nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
        "deep": nn.Sequential(
            *(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 10)
        ),
    }
    for name, network in networks.items():
        save_state_dict(network.state_dict(), folder / f"{name}.safetensors")
    noisy = {key: value + 0.01 * torch.randn_like(value) for key, value in networks["mlp"].state_dict().items()}
    save_state_dict(noisy, folder / "mlp-noisy.safetensors")


def batches(encoder: sne_fast.SNE, files: list[Path]) -> Iterator[sne_fast.WeightBatch]:
    """Pack files one by one, and join them up to a budget of weights, so that memory stays bounded."""
    held: list[sne_fast.WeightBatch] = []
    for file in files:
        packed = encoder.pack([file])
        if held and sum(batch.num_weights for batch in held) + packed.num_weights > BATCH_WEIGHTS:
            yield sne_fast.WeightBatch.cat(held)
            held = []
        held.append(packed)
    if held:
        yield sne_fast.WeightBatch.cat(held)


@torch.no_grad()
def encode(folder: Path, model: str | None = None) -> tuple[list[str], Tensor]:
    """Return the names of the checkpoints in `folder` and their vectors `(n, h)`."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=64) if model is None else sne_fast.SNE.from_pretrained(model)
    z = torch.cat([encoder.eval()(batch) for batch in batches(encoder, files)])
    return [file.stem for file in files], z


def nearest(names: list[str], z: Tensor) -> dict[str, str]:
    """Return the network whose vector is nearest to that of each network."""
    distances = torch.cdist(z, z).fill_diagonal_(torch.inf)
    return {name: names[int(row.argmin())] for name, row in zip(names, distances, strict=True)}


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(arguments[0]) if arguments else Path(made)
        if not arguments:
            make_checkpoints(folder)
        names, z = encode(folder, *arguments[1:])
        for name, other in nearest(names, z).items():
            print(f"{name}: nearest is {other}")


if __name__ == "__main__":
    main(sys.argv[1:])
