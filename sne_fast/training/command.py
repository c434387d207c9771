"""`sne-fast train`: a predictor of columns of a zoo, trained, resumed and evaluated in one folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.weight_budgets import stratified_split
from ..nn import input_scales as input_normaliser
from ..nn.encoder import SNE
from ..nn.predictor import Predictor
from ..reports.reporting import measures, write_csv, write_json
from ..symmetry import PermutationAugmentation, Symmetry, chain_symmetry, zoo_symmetries
from ..zoo import Zoo
from .distributed import World, processes
from .loop import fit, predict
from .progress import CsvLog, Log, TensorBoardLog
from .settings import FitSettings, History

if TYPE_CHECKING:
    from rich.console import Console

PARTS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
CHECKPOINT = "fit.pt"
LOGS = ("csv", "tensorboard")
INPUT_SCALES = ("tensor", *input_normaliser.INPUT_SCALES, "none")


@dataclass(frozen=True)
class TrainCommand:
    """What `sne-fast train` is asked for; `encoder` holds arguments of `SNE`, `fit` those of the loop.

    `targets`: columns of the zoo. `loss`: of :class:`sne_fast.Predictor`; "cross_entropy" takes one column, of any
    values, as classes. `split`: a column that says train, validation or test; without it networks are shared out 80, 10
    and 10 % within each architecture. `permute`: draw fresh permutations of hidden units for every batch.
    `input_scale`: what weights are divided by: "tensor", each tensor's own root mean square; "zoo", that of its like in
    the training networks (:class:`sne_fast.nn.input_scales.InputNormaliser`); "fan_in", one over the root of their
    layer's fan-in (:class:`sne_fast.nn.input_scales.FanInScale`); "none". `code_gain`: as in
    :meth:`sne_fast.SNE.fill_code_gains`.
    """

    zoo: Path
    out: Path
    targets: tuple[str, ...]
    loss: str = "mse"
    transform: str = "identity"
    head: tuple[int, ...] = (512, 512)
    split: str | None = None
    permute: bool = False
    input_scale: str = "tensor"
    code_gain: float | None = None
    log: str = "csv"
    device: str = "cpu"
    encoder: dict[str, Any] = field(default_factory=dict)
    fit: FitSettings = field(default_factory=FitSettings)


def train(command: TrainCommand, console: Console) -> dict[str, Any]:
    """Train, evaluate on the test networks, and write `predictor/`, `metrics.json`, `predictions.csv` and the log.

    A run that was killed goes on when the same command is given again: `fit.pt` in `out` is its state. Under `torchrun`
    the processes share each batch.

    Returns:
        What `metrics.json` holds.

    Raises:
        KeyError: a column that the zoo does not have.
        ValueError: columns that do not fit the loss, a split without networks to train or test, or a folder that holds
            a training with other settings.
    """
    if command.log not in LOGS:
        raise ValueError(f"train: log must be one of {', '.join(LOGS)}, got {command.log!r}")
    if command.input_scale not in INPUT_SCALES:
        raise ValueError(f"train: input_scale must be one of {', '.join(INPUT_SCALES)}, got {command.input_scale!r}")
    if command.fit.invariance and not command.permute:
        raise ValueError("train: the invariance loss compares permuted copies; it needs --permute")
    with processes() as world:
        return _train(command, console, world)


def _train(command: TrainCommand, console: Console, world: World) -> dict[str, Any]:
    zoo = Zoo.open(command.zoo)
    parts = split_zoo(zoo, command.split, command.fit.seed)
    targets, classes = read_targets(zoo, command.targets, command.loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(command.fit.seed)
        names = classes if classes is not None else list(command.targets)
        encoder = SNE(**command.encoder, scale="tensor" if command.input_scale == "tensor" else "none")
        if command.code_gain is not None:
            encoder.fill_code_gains(command.code_gain)
        predictor = Predictor(
            encoder,
            len(names),
            command.head,
            names,
            command.transform,
            command.loss,
            command.input_scale in input_normaliser.INPUT_SCALES and command.input_scale,
        ).to(_device(command.device))
    with console.status("packing"):
        batch = predictor.encoder.pack(zoo, device="cpu")
    augment = None
    if command.permute:
        with console.status("finding symmetries"):
            augment = PermutationAugmentation(symmetries_of(zoo[parts["train"]]))
    log: Log = CsvLog(command.out / "log.csv")
    if command.log == "tensorboard":
        log = TensorBoardLog(command.out / "tensorboard")

    def on_epoch(epoch: int, history: History) -> None:
        if world.first:
            unseen = f", unseen {history.validation_loss[-1]:.4g}" if history.validation_loss else ""
            console.print(
                f"epoch {epoch + 1}/{command.fit.epochs}: loss {history.train_loss[-1]:.4g}{unseen}, "
                f"{history.weights_per_second / 1e3:.0f}k weights/s",
                highlight=False,
            )

    rows, watched = parts["train"], parts["validation"]
    history = fit(
        predictor, batch[rows], targets[rows], command.fit,
        validation=(batch[watched], targets[watched]) if watched else None,
        augment=augment, checkpoint=command.out / CHECKPOINT, log=log, on_epoch=on_epoch,
    )  # fmt: skip
    metrics: dict[str, Any] = {
        "command": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(command).items()},
        "networks": {name: len(part) for name, part in parts.items()},
        "weights": batch.num_weights,
        "processes": world.size,
        "history": dataclasses.asdict(history),
    }
    test = parts["test"]
    values = predict(predictor, batch[test])[0].cpu()
    metrics["test"] = evaluate(values, targets[test], names, classes is not None)
    if world.first:
        predictor.save_pretrained(command.out / "predictor")
        write_json(command.out / "metrics.json", metrics)
        held = zoo[test]
        write_csv(
            command.out / "predictions.csv",
            ["name", *command.targets, *(f"predicted {name}" for name in names)],
            [
                (name, *(held.rows[i][t] for t in command.targets), *values[i].tolist())
                for i, name in enumerate(held.column("name"))
            ],
        )
    return metrics


def split_zoo(zoo: Zoo, column: str | None, seed: int) -> dict[str, list[int]]:
    """Positions of the training, validation and test networks."""
    if column is None:
        groups = [str(a) for a in zoo.column("architecture")] if "architecture" in zoo.columns else [""] * len(zoo)
        parts = dict(zip(PARTS, stratified_split(groups, SHARES, seed), strict=True))
    else:
        said = [str(value) for value in zoo.column(column)]
        unknown = sorted({value for value in said if value not in PARTS})
        if unknown:
            raise ValueError(f"train: column {column!r} must say {', '.join(PARTS)}, got {', '.join(unknown[:5])}")
        parts = {name: [i for i, value in enumerate(said) if value == name] for name in PARTS}
    for name in ("train", "test"):
        if not parts[name]:
            raise ValueError(f"train: the split leaves no {name} networks of {len(zoo)}")
    return parts


def read_targets(zoo: Zoo, columns: Sequence[str], loss: str) -> tuple[Tensor, list[str] | None]:
    """Targets `(n, t)`, or class numbers `(n,)` and the classes' names."""
    if loss == "cross_entropy":
        if len(columns) != 1:
            raise ValueError(f"train: cross_entropy takes one column of classes, got {', '.join(columns) or 'none'}")
        values = zoo.column(columns[0]).tolist()
        if any(value is None or value != value for value in values):
            raise ValueError(f"train: column {columns[0]!r} must hold a class for every network")
        found = sorted(set(values))
        return torch.tensor([found.index(value) for value in values]), [str(value) for value in found]
    if not columns:
        raise ValueError(f"train: give at least one target; the zoo has {', '.join(zoo.targets or zoo.columns)}")
    numbers = []
    for name in columns:
        values = zoo.column(name)
        if values.dtype.kind not in "iufb" or (values != values).any():
            raise ValueError(f"train: column {name!r} must hold a number for every network")
        numbers.append(torch.from_numpy(values.astype("float64")))
    return torch.stack(numbers, 1).to(torch.get_default_dtype()), None


def symmetries_of(zoo: Zoo) -> list[Symmetry]:
    """Of every network: traced where this package has its architecture, else read from the names of a plain chain."""
    from ..zoo.architectures import ARCHITECTURES

    known = [str(a) for a in zoo.column("architecture")] if "architecture" in zoo.columns else []
    if known and all(name in ARCHITECTURES for name in known):
        return zoo_symmetries(zoo)
    chains: dict[Any, Symmetry] = {}
    found = []
    for i in range(len(zoo)):
        state = zoo.state_dict(i)
        shapes = tuple((name, tuple(t.shape)) for name, t in state.items())
        if shapes not in chains:
            chains[shapes] = chain_symmetry(state, name=str(zoo.rows[i]["name"]))
        found.append(chains[shapes])
    return found


def evaluate(values: Tensor, targets: Tensor, names: Sequence[str], classes: bool) -> dict[str, Any]:
    """Accuracy of classes, or by target Kendall's tau, R2, MAE and RMSE."""
    if classes:
        return {"accuracy": (values.argmax(1) == targets).double().mean().item()}
    return {name: measures(values[:, i].numpy(), targets[:, i].numpy()) for i, name in enumerate(names)}


def _device(name: str) -> torch.device:
    """The device; under `torchrun` each process's own GPU."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
