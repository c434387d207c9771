"""Make the networks that `sne-small` learns from, train it, and calibrate it.

python bench/sne_small.py -o FOLDER            # the encoder that comes with the package, in FOLDER/encoder
python bench/sne_small.py -o FOLDER --seed 1   # another one

On one machine, with one version of torch, the same seed gives the same bits; on other processors the last bits differ.
The encoder is then to be copied to sne_fast/models/sne-small. What is in FOLDER is not made again, and training goes on
where it stopped.

The networks: 1,920 of `make_pretraining_zoo` (MLPs, CNNs, vision transformers, small GPTs and SIRENs, half of them
trained for some steps and half with random weights), and 560 classifiers of 14 architectures trained on shapes and
textures. None of them learnt to tell digits, MNIST, wine or brackets, though each SIREN holds an image of MNIST, and
none is residual or recurrent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

import sne_fast
from sne_fast.data.batch import WeightBatch
from sne_fast.training import (
    Contrastive,
    ContrastiveModel,
    FitSettings,
    History,
    Views,
    calibrate,
    fit_contrastive,
    linear_probe,
)
from sne_fast.zoo import Zoo, make_classifier_zoo, make_pretraining_zoo
from sne_fast.zoo.index import INDEX
from sne_fast.zoo.symmetries import symmetries_of

ARCHITECTURES = ("mlp", "cnn", "vit", "gpt", "siren")
LEFT_OUT = ("digits", "mnist", "wine", "brackets")
CLASSIFIERS = {"shapes": 1, "textures": 2}
"""Data set -> seed."""
EPOCHS = 50
PROBE_EVERY = 5
AT_ONCE = 150_000
"""Weights that are encoded with a graph at a time."""


def zoos(folder: Path) -> list[Zoo]:
    """Make the networks to learn from, or open those that are there."""
    found = [
        _opened(folder / "pretraining")
        or make_pretraining_zoo(folder / "pretraining", 120, seed=0, architectures=ARCHITECTURES, left_out=LEFT_OUT)
    ]
    for dataset, seed in CLASSIFIERS.items():
        path = folder / dataset
        made = _opened(path) or make_classifier_zoo(
            path, 280, dataset=dataset, seed=seed, max_steps=300, spread="trained"
        )
        found.append(made)
    return found


def _opened(folder: Path) -> Zoo | None:
    return Zoo.open(folder) if (folder / INDEX).is_file() else None


def train(zoos: list[Zoo], folder: Path, seed: int, report: Callable[[str], None]) -> sne_fast.SNE:
    """Train an encoder on zoos without labels and calibrate it; the checkpoint before that is in the folder."""
    torch.manual_seed(seed)
    encoder = sne_fast.SNE(hidden_dim=64, statistics="relative", set_attention="isab", num_inducing=16, chunks=False)
    encoder.fill_code_gains(1.0)
    model = ContrastiveModel(encoder)
    batch = WeightBatch.cat([encoder.pack(zoo).detach() for zoo in zoos])
    encoder.set_statistics(batch)
    rows = [row for zoo in zoos for row in zoo.rows]
    views = Views([symmetry for zoo in zoos for symmetry in symmetries_of(zoo)])
    objective = Contrastive(model, views, temperature=0.07, weights_at_once=AT_ONCE)
    families = sorted({row["family"] for row in rows})
    kinds = torch.tensor([families.index(row["family"]) for row in rows])
    fitted = torch.arange(len(rows)) % 4 != 0

    def on_epoch(epoch: int, history: History) -> None:
        line = f"epoch {epoch + 1}: loss {history.train_loss[-1]:.3f}"
        if epoch % PROBE_EVERY == PROBE_EVERY - 1:
            encoder.eval()
            with torch.no_grad():
                z = torch.cat([encoder(batch[i : i + 64]) for i in range(0, len(batch), 64)])
            encoder.train()
            line += f", linear probe of the family {linear_probe(z, kinds, fitted):.2f}"
        report(line)

    settings = FitSettings(epochs=EPOCHS, lr=2e-3, batch_weights=200_000, seed=seed)
    clusters = [row["architecture"] for row in rows]
    fit_contrastive(
        model, batch, objective, settings, clusters=clusters, checkpoint=folder / "fit.pt", on_epoch=on_epoch
    )
    calibrate(encoder, batch, views, seed=seed)
    return encoder.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the order of sums depends on their number
    start = time.process_time()

    def report(line: str) -> None:
        print(f"{time.process_time() - start:.0f} CPU s: {line}", flush=True)

    known = zoos(options.out)
    report(f"{sum(map(len, known))} networks of {sum(int(zoo.sizes.sum()) for zoo in known):,} weights")
    train(known, options.out, options.seed, report).save_pretrained(options.out / "encoder")


if __name__ == "__main__":
    main()
