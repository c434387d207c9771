"""Make the networks that `sne-small` learns from, and train it.

python bench/sne_small.py -o FOLDER            # the encoder that comes with the package, in FOLDER/encoder
python bench/sne_small.py -o FOLDER --seed 1   # another one

On one machine, with one version of torch, the same seed gives the same bits; on other processors the last bits differ.
The encoder is then to be copied to sne_fast/models/sne-small. What is in FOLDER is not made again, and training goes on
where it stopped.

The networks: 1,920 of `make_pretraining_zoo` (MLPs, CNNs, vision transformers, small GPTs and SIRENs, half of them
trained for some steps and half with random weights), and 560 classifiers of 14 architectures trained on shapes and
textures. Of the data sets digits, MNIST, wine and brackets, and of residual and recurrent networks there are none.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from retrieval import train_encoder

from sne_fast.zoo import Zoo, make_classifier_zoo, make_pretraining_zoo
from sne_fast.zoo.index import INDEX

ARCHITECTURES = ("mlp", "cnn", "vit", "gpt", "siren")
LEFT_OUT = ("digits", "mnist", "wine", "brackets")
CLASSIFIERS = {"shapes": 1, "textures": 2}
"""Data set -> seed."""
SETTINGS = {
    "epochs": 50, "lr": 2e-3, "batch_weights": 200_000, "temperature": 0.07, "hidden_dim": 64, "set_attention": "isab",
    "no_chunks": True, "max_chunks": None, "relatives": 0.0,
}  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(namespace=argparse.Namespace(**SETTINGS))
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the order of sums depends on their number
    start = time.process_time()

    def report(line: str) -> None:
        print(f"{time.process_time() - start:.0f} CPU s: {line}", flush=True)

    known = zoos(options.out)
    report(f"{sum(map(len, known))} networks of {sum(int(zoo.sizes.sum()) for zoo in known):,} weights")
    train_encoder(known, options, report).encoder.save_pretrained(options.out / "encoder")


if __name__ == "__main__":
    main()
