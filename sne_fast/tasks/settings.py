"""Settings of `sne-fast demo`, `train` and `task`: one frozen dataclass per command, the source of its options.

The command line makes an option of every field that has `help` in its metadata; its type, choices and default are the
field's. Further metadata, all optional:

- `argument`: the field is a positional argument;
- `flags`: the option's names, where they are not the field's;
- `shown`: the text that stands for the default in the help;
- `min`, `max`: bounds of a number;
- `of_recipe`: the field replaces a value of the recipe, unless it is None or ().

This module imports neither torch nor any other heavy library, so that the help of a command appears at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.choices import Chunking
from ..free_memory import parse_bytes
from ..nn.choices import Loss, SetAttention, Statistics, Transform
from ..training.recipes import CONTRASTIVE, RECIPES, InputScale, TrainingRecipe, UnitOrder, check_choices, find_recipe
from ..training.settings import AmpDtype

LogFormat = Literal["csv", "tensorboard"]
Objective = Literal["targets", "contrastive"]
TaskName = Literal[
    "inr", "accuracy", "mnist-accuracy", "mnist-inr", "cross-dataset", "cross-architecture", "transformers"
]

SEEDS = (0, 1, 2)
"""Seeds of a task unless others are asked for."""


def option(default: Any = MISSING, *, help: str, **metadata: Any) -> Any:
    """Return a dataclass field that the command line turns into an option (see the module's docstring)."""
    return field(default=default, metadata={"help": help, **metadata})


_DEMO = RECIPES["best"].replace(batch_weights=12_000)


@dataclass(frozen=True)
class Demo:
    """Settings of the demo's run; `max_steps` bounds the training of each network of the zoo."""

    seed: int = 0
    networks: int = 1440
    max_steps: int = 600
    recipe: TrainingRecipe = _DEMO

    @property
    def values(self) -> dict[str, Any]:
        """All settings by name, as JSON holds them."""
        return {**dataclasses.asdict(self), "recipe": self.recipe.values}

    @classmethod
    def quick(cls, seed: int = 0) -> Demo:
        """Return the settings of a small run, which shows the whole path rather than the quality."""
        small = cls.recipe.replace(epochs=24, batch_weights=6_000)
        return cls(seed=seed, networks=180, max_steps=300, recipe=small)

    def replace(self, **changes: Any) -> Demo:
        """Return the same settings with some of them changed, those of the recipe by their own names."""
        own = {field.name for field in dataclasses.fields(self)}
        recipe = self.recipe.replace(**{name: value for name, value in changes.items() if name not in own})
        return dataclasses.replace(
            self, **{"recipe": recipe, **{name: value for name, value in changes.items() if name in own}}
        )


@dataclass(frozen=True)
class DemoSettings:
    """Options of `sne-fast demo`; `demo` gives the settings of the run that they ask for."""

    out: Path = option(
        Path("sne-demo"),
        help="Folder for everything it makes; new, empty, or of an interrupted run, which resumes.",
        flags=("--out", "-o"),
    )
    seed: int = option(0, help="Seed of the zoo, the split and the training.", min=0, max=2**32 - 1)
    quick: bool = option(False, help="Make a small run, to see it work in under a minute.")
    networks: int | None = option(
        None, help="Number of networks to train.", shown=f"{Demo.networks}, quick {Demo.quick().networks}"
    )
    epochs: int | None = option(
        None, help="Epochs of the predictor.", shown=f"{Demo.recipe.epochs}, quick {Demo.quick().recipe.epochs}"
    )
    hidden_dim: int | None = option(None, help="Width of the encoder.", shown=str(Demo.recipe.hidden_dim))

    @property
    def demo(self) -> Demo:
        """Settings of the run."""
        chosen = {"networks": self.networks, "epochs": self.epochs, "hidden_dim": self.hidden_dim}
        settings = Demo.quick(self.seed) if self.quick else Demo(seed=self.seed)
        return settings.replace(**{name: value for name, value in chosen.items() if value is not None})


def of_recipe(help: str, **metadata: Any) -> Any:
    """Return an option that replaces a value of the recipe, of the same name."""
    return option(None, help=help, shown="the recipe's", of_recipe=True, **metadata)


@dataclass(frozen=True)
class TrainSettings:
    """Options of `sne-fast train`: the zoo, what to predict of its networks, and the recipe.

    `targets` are columns of the zoo; "cross_entropy" takes one column, of any values, as classes. Without `split`, a
    column that says train, validation or test, the networks are split 80/10/10 within each architecture. What is not
    listed are values of the recipe, see :class:`sne_fast.training.TrainingRecipe`: None, or () for `head`, leaves them
    as they are.

    Raises:
        ValueError: a value that is not among a field's choices, no such recipe, or values that do not fit together.
    """

    zoo: Path = option(help="Folder of a zoo, or of checkpoints with a table index.csv.", argument=True)
    out: Path = option(help="Folder for the predictor; the same command resumes.", flags=("--out", "-o"))
    targets: tuple[str, ...] = option((), help="Column to predict; repeat for several.", flags=("--target",))
    objective: Objective = option(
        "targets",
        help="targets trains a predictor of columns; contrastive trains an encoder without labels, to tell views "
        "of a network from other networks, with targets as a help.",
    )
    max_chunks: int | None = option(
        None, help="Contrastive: encode a sample of so many chunks of each larger tensor.", shown="all", min=2
    )
    recipe: str = option(
        "best",
        help="best, for properties of the training such as accuracy; across, the same on architectures never seen, and "
        "datasets on data sets never seen; inr, for implicit representations with sines or other odd activations; "
        "paper; or a recipe.json. The contrastive objective has one of its own in place of best.",
    )
    loss: Loss = option("mse", help="Loss; bce takes targets in [0, 1], cross_entropy takes classes.")
    transform: Transform = option("identity", help="Transform of mse targets; logit takes targets in [0, 1].")
    split: str | None = option(
        None, help="Column that says train, validation or test.", shown="80/10/10 by architecture"
    )
    drop_missing: bool = option(False, help="Leave out networks without a value of a target.")
    stack: bool = option(False, help="Also fit boosted trees, and average their predictions with SNE's.")
    statistics: Statistics | None = of_recipe("Statistics of tensors that SNE is told.")
    chunks: bool | None = of_recipe("Encode chunks of weights, or statistics alone.", flags=("--chunks/--no-chunks",))
    units: UnitOrder | None = of_recipe("Order of hidden units; all but given need known symmetries.")
    odd: bool | None = of_recipe(
        "Canonical units: turn signs too, for odd activations such as sine and tanh.", flags=("--odd/--no-odd",)
    )
    jitter: float | None = of_recipe("Canonical units: noise on the keys in training.")
    invariance: float | None = of_recipe("Weight of the logit-invariance loss; not for given units.")
    ranking: float | None = of_recipe("Weight of the ranking loss: which of two networks has the larger target.")
    relative: bool | None = of_recipe(
        "Replace types and levels by ones that architectures share.", flags=("--relative/--no-relative",)
    )
    hidden_dim: int | None = of_recipe("Width of the encoder.")
    num_heads: int | None = of_recipe("Attention heads of the encoder.")
    chunk_size: int | None = of_recipe("Largest number of weights in a chunk.")
    chunking: Chunking | None = of_recipe("Rule that cuts tensors into chunks.")
    set_attention: SetAttention | None = of_recipe("Set attention; isab is for tensors of a million weights and more.")
    input_scale: InputScale | None = of_recipe(
        "Divide weights by the RMS of their tensor (tensor), by that of such tensors in the training networks "
        "(zoo), by one over the root of the fan-in (fan_in), or not (none)."
    )
    code_gain: float | None = of_recipe("Initial gain of the position codes.")
    head: tuple[int, ...] = option(
        (), help="Width of a hidden layer of the head; repeat for several.", shown="the recipe's", of_recipe=True
    )
    epochs: int | None = of_recipe("Passes over the training networks.")
    lr: float | None = of_recipe("Peak learning rate.")
    batch_weights: int | None = of_recipe("Largest number of weights that a process encodes at once.")
    accumulate: int | None = of_recipe("Such batches that each process takes one after another in a step.")
    weight_decay: float | None = of_recipe("Weight decay of matrices.")
    patience: int | None = of_recipe("Epochs without improvement after which training ends.")
    amp: AmpDtype | None = option(None, help="Train under autocast in this dtype.")
    buckets: bool = option(False, help="Pad the batches, so that their sizes repeat.")
    capture: bool = option(False, help="Replay steps of sizes that repeat as CUDA graphs; pads as --buckets does.")
    max_memory: str | None = option(
        None,
        help="Memory that the networks may take, such as 8G or 500M; a zoo that needs more is read in every epoch.",
        shown="half of the machine's",
    )
    workers: int = option(0, help="Processes that read ahead where networks are read in every epoch.", min=0)
    log: LogFormat = option("csv", help="Format of the log.")
    seed: int = option(0, help="Seed of the initial parameters, the split, the order and the permutations.")
    device: str = option("cpu", help="Device to run on, such as cpu or cuda.")

    def __post_init__(self) -> None:
        check_choices(self, "train")
        _ = self.chosen
        for_targets = (self.stack, self.max_memory is not None, self.workers, self.buckets, self.capture)
        if self.objective == "contrastive" and any(for_targets):
            names = "--stack, --max-memory, --workers, --buckets and --capture"
            raise ValueError(f"train: {names} are for predictors of targets")
        if self.objective == "contrastive" and (unused := self._unused_without_labels()):
            raise ValueError(
                f"train: the contrastive objective has no use for {', '.join(unused)}; leave their defaults"
            )
        if self.objective != "contrastive" and self.max_chunks is not None:
            raise ValueError("train: --max-chunks is for the contrastive objective")
        if self.max_memory is not None:
            parse_bytes(self.max_memory)

    def _unused_without_labels(self) -> list[str]:
        """Return the names of values that training without labels would leave out."""
        recipe, plain = self.chosen, CONTRASTIVE
        names = ("units", "odd", "jitter", "relative", "invariance", "ranking")
        found = [name for name in names if getattr(recipe, name) != getattr(plain, name)]
        if recipe.input_scale not in ("tensor", "none"):
            found.append("input_scale")
        return found + [
            name for name in ("loss", "transform", "head") if getattr(self, name) != getattr(TrainSettings, name)
        ]

    @property
    def chosen(self) -> TrainingRecipe:
        """The recipe, with the values that were given."""
        names = [field.name for field in dataclasses.fields(self) if field.metadata.get("of_recipe")]
        given = {name: getattr(self, name) for name in names}
        own = self.objective == "contrastive" and self.recipe == TrainSettings.recipe
        return (CONTRASTIVE if own else find_recipe(self.recipe)).replace(
            **{k: v for k, v in given.items() if v is not None and v != ()}
        )


@dataclass(frozen=True)
class TaskSettings:
    """Options of `sne-fast task`; see :func:`sne_fast.tasks.run_task`."""

    name: TaskName = option(help="Experiment to run.", argument=True)
    out: Path = option(help="Folder for zoos, runs and report; resumes.", flags=("--out", "-o"))
    seeds: tuple[int, ...] = option(
        SEEDS, help="Seed of a run; repeat for several.", flags=("--seed",), shown="0, 1 and 2"
    )
    methods: tuple[str, ...] = option(
        (),
        help="Row of the table: SNE or one of its ablations by its name, mean, statistics, statistics_rich, deepsets, "
        "mlp, nfn, probes, or across architectures statistics_fan_in, statistics_relative; repeat for several.",
        flags=("--method",),
        shown="all",
    )
    networks: int | None = option(None, help="Number of networks of all zoos.", shown="the task's")
    epochs: int | None = option(None, help="Epochs of SNE.", shown="the task's")
    curves: bool = option(
        True,
        help="Train SNE and the baselines on shares of the training networks too, for learning curves.",
        flags=("--curves/--no-curves",),
    )
