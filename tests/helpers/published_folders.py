"""Small folders in the forms in which others published their zoos, for the docstring examples that read them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sne_fast.data.checkpoints import save_state_dict
from sne_fast.zoo.architectures import unterthiner_cnn
from sne_fast.zoo.rebuilding import accuracy
from sne_fast.zoo.schuerholt import SchuerholtCNN
from sne_fast.zoo.sirens import Siren

KERAS = {"conv0": "conv2d", "conv1": "conv2d_1", "conv2": "conv2d_2", "dense": "dense"}


def write_all(folder: Path) -> dict[str, Any]:
    """Write a folder of every form into `folder`; return the names of data that the examples verify them with."""
    generator = torch.Generator().manual_seed(0)

    def images(side: int) -> tuple[Tensor, Tensor]:
        return (
            torch.randn(64, 1, side, side, generator=generator),
            torch.randint(10, (64,), generator=generator),
        )  # fmt: skip

    svhn, mnist = images(32), images(28)
    _write_unterthiner(folder / "svhn_cropped", *svhn)
    _write_schuerholt(folder / "tune_zoo_mnist_uniform", *mnist)
    pictures = _write_dwsnets(folder / "dataset")
    _write_nfn(folder / "siren_mnist_wts")
    _write_checkpoints(folder / "runs")
    save_state_dict(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).state_dict(), folder / "mlp.safetensors")
    return {
        "svhn_test": svhn[0], "svhn_labels": svhn[1], "mnist_test": mnist[0], "mnist_labels": mnist[1],
        "mnist": (pictures, pictures),
    }  # fmt: skip


def _write_unterthiner(folder: Path, images: Tensor, labels: Tensor) -> None:
    folder.mkdir(parents=True)
    flats, rows, layout = [], [], []
    for k in range(20):
        module = unterthiner_cnn("relu").eval()
        parts, layout, start = [], [], 0
        for name, keras in KERAS.items():
            kernel = module.state_dict()[f"{name}.weight"]
            kernel = kernel.permute(2, 3, 1, 0) if kernel.ndim == 4 else kernel.t()
            for own, tensor in (("bias:0", module.state_dict()[f"{name}.bias"]), ("kernel:0", kernel)):
                layout.append([f"sequential/{keras}/{own}", start, start + tensor.numel(), str(tuple(tensor.shape))])
                parts.append(tensor.reshape(-1))
                start += tensor.numel()
        flats.append(torch.cat(parts).numpy())
        rows.append({"config.activation": "relu", "modeldir": f"/run/{k}", "step": 86, "test_loss": 2.3,
                     "train_loss": 2.3, "train_accuracy": 0.1,
                     "test_accuracy": accuracy(module, images, labels)})  # fmt: skip
    np.save(folder / "weights.npy", np.stack(flats))
    with open(folder / "layout.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["varname", "start_idx", "end_idx", "shape"], *layout])
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_schuerholt(folder: Path, images: Tensor, labels: Tensor) -> None:
    config = {"model::type": "CNN", "model::channels_in": 1, "model::nlin": "tanh", "model::dropout": 0.0}
    for k in range(5):
        module = SchuerholtCNN("CNN", 1, "tanh", dropout=False).eval()
        checkpoint = folder / f"NN_tune_trainable_{k:05d}" / "checkpoint_000050"
        checkpoint.mkdir(parents=True)
        torch.save(module.state_dict(), checkpoint / "checkpoints")
        line = {"train_loss": 2.3, "train_acc": 0.1, "test_loss": 2.3, "test_acc": accuracy(module, images, labels),
                "training_iteration": 50, "config": config}  # fmt: skip
        (checkpoint.parent / "params.json").write_text(json.dumps(config))
        (checkpoint.parent / "result.json").write_text(json.dumps(line) + "\n")


def _named(siren: nn.Module, pattern: str, last: str) -> dict[str, Tensor]:
    names = [pattern.format(0), pattern.format(1), last]
    return {f"{names[k]}.{own}": siren.state_dict()[f"{k}.{own}"] for k in range(3) for own in ("weight", "bias")}


def _write_dwsnets(folder: Path) -> dict[int, Tensor]:
    """Write ten networks; return what each of them draws, by the number of its image."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    splits: dict[str, dict[str, list[str]]] = {name: {"path": [], "label": []} for name in ("train", "val", "test")}
    pictures = {}
    for k in range(10):
        siren = Siren((2, 32, 32, 1), offset=0.5)
        part, split = ("training", "train") if k < 8 else ("testing", "test")
        file = folder / "mnist-inrs" / f"mnist_png_{part}_{k}_{k}" / "checkpoints" / "model_final.pth"
        file.parent.mkdir(parents=True)
        torch.save(_named(siren, "seq.{}", "seq.2"), file)
        splits[split]["path"].append(f"/home/them/DWSNets/{file.relative_to(folder.parent)}")
        splits[split]["label"].append(str(k))
        pictures[k] = siren(torch.stack([x, y], -1).view(-1, 2)).detach().view(8, 8)
    (folder / "mnist_splits.json").write_text(json.dumps(splits))
    return pictures


def _write_nfn(folder: Path) -> None:
    for k in range(3):
        file = folder / f"randinit_smaller_{k}s" / f"net{k}.pth"
        file.parent.mkdir(parents=True)
        torch.save(_named(Siren((2, 32, 32, 1)), "net.{}.linear", "net.2"), file)


def _write_checkpoints(folder: Path) -> None:
    """Write three linear networks and a table that says how wide each is and how accurate."""
    folder.mkdir()
    lines = ["file,width,accuracy"]
    for k in range(3):
        save_state_dict(nn.Linear(4, 2 + k).state_dict(), folder / f"net{k}.safetensors")
        lines.append(f"net{k}.safetensors,{2 + k},{k / 10}")
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
