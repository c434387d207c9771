"""Train a predictor on your own checkpoints: a folder of files, and a table that says what each of them reached.

python examples/own_checkpoints.py [FOLDER [TABLE.csv [TARGET]]]

Without a folder, sixty small networks are made in a temporary one, and the predictor learns the norm of their weights.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import sne_fast
from sne_fast.data.checkpoints import save_state_dict
from sne_fast.training import FitSettings, fit, predict, stratified_split
from sne_fast.zoo import load_checkpoints


def make_checkpoints(folder: Path, networks: int = 60) -> None:
    """Write networks of two architectures and `results.csv`, with a column `norm` as the target."""
    torch.manual_seed(0)
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "width", "norm"])
        for i in range(networks):
            width = 8 if i % 2 else 16
            network = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
            with torch.no_grad():
                network[0].weight *= 0.2 + 4 * i / networks
            # Writes the order of the layers too, which plain safetensors files lose.
            save_state_dict(network.state_dict(), folder / f"net{i:03d}.safetensors")
            table.writerow([f"net{i:03d}.safetensors", width, network[0].weight.norm().item()])


def train(folder: Path, table: str = "results.csv", target: str = "norm", epochs: int = 20) -> float:
    """Train on 70 % of the checkpoints, save the predictor beside them, and return R2 on the 20 % never seen."""
    zoo = load_checkpoints(folder, table, targets=[target])
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=32)
    encoder.fill_code_gains(1.0)  # the label depends on which layer a weight belongs to
    predictor = sne_fast.Predictor(encoder, hidden_features=(64,), target_names=[target])
    batch = predictor.encoder.pack(zoo).detach()
    targets = torch.tensor(zoo.column(target), dtype=torch.float32)[:, None]
    known, watched, unseen = stratified_split([""] * len(zoo), (0.7, 0.1, 0.2))
    fit(
        predictor, batch[known], targets[known], FitSettings(epochs=epochs, lr=1e-3, batch_weights=500),
        validation=(batch[watched], targets[watched]),
    )  # fmt: skip
    predictor.save_pretrained(folder / "predictor")
    predicted, _ = predict(predictor, batch[unseen])
    goal = targets[unseen]
    return 1 - ((predicted - goal).square().sum() / (goal - goal.mean()).square().sum()).item()


def main(arguments: list[str]) -> None:
    if arguments:
        print(f"R2 on unseen networks: {train(Path(arguments[0]), *arguments[1:]):.3f}")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(Path(folder))
        print(f"R2 on unseen networks: {train(Path(folder)):.3f}")
        # The saved predictor takes any file, module or state dict.
        predictor = sne_fast.Predictor.from_pretrained(Path(folder) / "predictor")
        with torch.no_grad():
            print(f"net000: {predictor([Path(folder) / 'net000.safetensors']).item():.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
