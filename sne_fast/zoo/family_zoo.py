"""`make_family_zoo`: networks of many architectures and data sets, and what was made of them, with the true tree."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch

from .family_architectures import ARCHITECTURE_FAMILIES, Draws, build, draw_architecture, with_outputs
from .family_children import (
    FamilyRecipe,
    State,
    averaged,
    initial,
    pruned,
    rounded,
    score,
    state_of,
    train,
    with_new_head,
)
from .family_data import DATASETS, Task, alike, find_task
from .making import Group, Made, make_zoo
from .rebuilding import compare
from .table import Zoo

TARGETS = ("test_loss", "test_accuracy", "trained_steps")
HYPERPARAMETERS = ("steps", "lr", "weight_decay", "optimiser", "amount")
FAMILY_SIZE = 12
"""Networks of a family: the first, one of the same recipe with another seed, and ten made of them."""
_COST = {"mlp": 1.0, "cnn": 1.5, "resnet": 2.5, "vit": 4.0, "gpt": 5.0, "rnn": 4.0, "siren": 1.0}
_ADAM_RATES = {"mlp": (1e-3, 1e-2), "cnn": (1e-3, 1e-2), "resnet": (1e-3, 1e-2), "vit": (1e-3, 5e-3),
               "gpt": (1e-3, 5e-3), "rnn": (2e-3, 1e-2), "siren": (2e-4, 2e-3)}  # fmt: skip
_SGD_RATES = (0.01, 0.1)
_SGD_FAMILIES = ("mlp", "cnn", "resnet")


def make_family_zoo(
    folder: str | PathLike[str],
    families: int = 50,
    *,
    seed: int = 0,
    max_steps: int = 400,
    scale: float = 1.0,
    architectures: Sequence[str] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Train networks of many architectures on many data sets, make others of them, and write all with the true tree.

    A family is 12 networks. The first is trained from scratch, on a data set and with an architecture and
    hyperparameters of its own. Of the others, by the column `relation`:

    - `seed`: another network of the same recipe, from other initial weights;
    - `fine-tune`: trained on for 1 %, 10 % and 100 % of the first training, on these data or others of the kind;
    - `prune`: the smallest 30 to 70 % of every matrix set to zero;
    - `round`: matrices rounded to 8 bits;
    - `head`: a new output layer, for other classes where there are any, trained alone or with all the rest;
    - `lora`: a change of low rank of every matrix, trained and added;
    - `merge`: the mean of two children;

    and two more by fine-tuning, pruning or rounding a child. Families take turns among the families of architectures,
    and their parts depend on `seed` and their number alone. After an interruption the same call makes the families that
    are missing. The same arguments give the same zoo, interrupted or not.

    Args:
        folder: the folder of the files, made if missing; a finished zoo there is refused.
        families: number of families.
        seed: of everything that is drawn.
        max_steps: largest number of steps of a training from scratch; the least is a third of it.
        scale: factor of all widths. With 1, most networks have 2,000 to 50,000 weights.
        architectures: names from `family_architectures.ARCHITECTURE_FAMILIES`, all by default.
        on_progress: called with the share done, in [0, 1].

    Returns:
        A zoo whose rows hold `family` (of architectures), `architecture` (JSON), `dataset`, `relation`, `parent` and
        `second_parent` (names of rows, None for networks trained from scratch), `root` (the name of the first in the
        line of parents), `recipe` (a number, the same for networks that differ only in their seed), `generation`,
        `amount` (the share of training, of pruned weights, or the rank), the hyperparameters, `trained_steps` (with
        those of the parents), `test_accuracy` (None for regression) and `test_loss`.

    Raises:
        ValueError: no families, an unknown architecture, or an unfinished zoo of other arguments.
        FileExistsError: `folder` holds a zoo already.
        ModuleNotFoundError: pyarrow, scikit-learn or mlxtend is missing.

    Example:
        >>> trees = make_family_zoo("trees", 1, max_steps=5, scale=0.2, architectures=["cnn"])
        >>> trees.rows[8]["relation"], trees.rows[8]["parent"] == trees.rows[3]["name"]
        ('merge', True)
    """
    chosen = check_architectures("make_family_zoo", architectures)
    if families < 1 or max_steps < 1:
        raise ValueError(f"make_family_zoo: families and max_steps must be at least 1, got {families} and {max_steps}")
    kinds = [chosen[k % len(chosen)] for k in range(families)]
    groups = [
        Group(f"{k:05d}", k * FAMILY_SIZE, FAMILY_SIZE, FAMILY_SIZE * _COST[kind]) for k, kind in enumerate(kinds)
    ]

    def work(group: Group, on_share: Callable[[float], None]) -> list[Made]:
        number = group.first // FAMILY_SIZE
        return _Family(kinds[number], number, seed, max_steps, scale, on_share).make()

    about = {
        "source": "families",
        "families": families,
        "architectures": chosen,
        "seed": seed,
        "max_steps": max_steps,
        "scale": scale,
        "targets": list(TARGETS),
        "hyperparameters": list(HYPERPARAMETERS),
    }
    return make_zoo(folder, groups, work, about, on_progress)


def check_architectures(where: str, architectures: Sequence[str] | None) -> list[str]:
    """Return the names of families of architectures, all of them for None.

    Raises:
        ValueError: none, or a name that is not among them; the message begins with `where`.
    """
    chosen = list(ARCHITECTURE_FAMILIES) if architectures is None else list(architectures)
    if not chosen:
        raise ValueError(f"{where}: architectures must not be empty")
    for name in chosen:
        if name not in ARCHITECTURE_FAMILIES:
            raise ValueError(f"{where}: unknown architecture {name!r}; known are {', '.join(ARCHITECTURE_FAMILIES)}")
    return chosen


def recipe_for(kind: str, draws: Draws, max_steps: int, least: float = 1 / 3) -> FamilyRecipe:
    """Draw the hyperparameters of a training of `least * max_steps` to `max_steps` steps."""
    adam = kind not in _SGD_FAMILIES or draws.integer(0, 1) == 0
    low, high = _ADAM_RATES[kind] if adam else _SGD_RATES
    return FamilyRecipe(
        steps=max(1, round(draws.log_number(least * max_steps, max_steps))),
        lr=draws.log_number(low, high),
        weight_decay=draws.log_number(1e-5, 1e-2),
        optimiser="adam" if adam else "sgd",
    )


class _Family:
    """One family under way: what was drawn for it, and the networks made so far."""

    def __init__(
        self, kind: str, number: int, seed: int, max_steps: int, scale: float, on_share: Callable[[float], None]
    ) -> None:
        self.kind, self.number = kind, number
        self.seed = zlib.crc32(f"{seed}/{number}/{kind}".encode())
        self.draws = Draws(self.seed)
        data = self.draws.choice(self.draws.choice(DATASETS[self.draws.choice(ARCHITECTURE_FAMILIES[kind])]))
        self.task = find_task(data)
        if kind == "resnet" and self.task.shape[-1] > 8 and self.draws.integer(0, 1):
            self.task = find_task(self.draws.choice(alike("digits")))  # four times cheaper
        self.architecture = draw_architecture(kind, self.task, self.draws, scale)
        self.recipe = recipe_for(kind, self.draws, max_steps)
        self.states: list[State] = []
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self._on_share, self._steps = on_share, 0
        self._total = max(1.0, 4.2 * self.recipe.steps)

    def make(self) -> list[Made]:
        """Return the stacks of the family: all but the network with a new head, and that one."""
        first, draws = self.task, self.draws
        self._from_scratch("root", None)
        self._from_scratch("seed", 0)
        self._fine_tune(0, 0.01, first)
        self._fine_tune(0, 0.1, self._other_task())
        self._fine_tune(0, 1.0, draws.choice((first, self._other_task())))
        self._change(0, "prune")
        self._change(0, "round")
        self._lora(0)
        self._merge(3, 4)
        left = [(k, relation) for k in (3, 4, 7) for relation in ("fine-tune", "prune", "round")]
        for _ in range(2):
            parent, relation = left.pop(draws.integer(0, len(left) - 1))
            if relation == "fine-tune":
                self._fine_tune(parent, draws.choice((0.01, 0.1)), self._task_of(parent))
            else:
                self._change(parent, relation)
        alike_ = len(self.states)
        self._new_head(0)
        self._on_share(1.0)
        return [self._stacked(range(alike_)), self._stacked(range(alike_, len(self.states)))]

    def _stacked(self, which: range) -> Made:
        states = [self.states[k] for k in which]
        return {name: torch.stack([s[name] for s in states]) for name in states[0]}, [self.rows[k] for k in which]

    def _step(self) -> None:
        self._steps += 1
        self._on_share(min(0.99, self._steps / self._total))

    def _own_seed(self) -> int:
        return zlib.crc32(f"{self.seed}/{len(self.states)}".encode())

    def _task_of(self, k: int) -> Task:
        return find_task(self.rows[k][1]["dataset"])

    def _other_task(self) -> Task:
        """Return another data set of the same inputs and outputs, or the same one if there is none."""
        others = [name for name in alike(self.task.name) if name != self.task.name]
        return find_task(self.draws.choice(others)) if others else self.task

    def _add(
        self,
        state: State,
        relation: str,
        task: Task,
        recipe: FamilyRecipe,
        parents: Sequence[int] = (),
        *,
        amount: float | None = None,
        architecture: str | None = None,
        of_recipe: bool = False,
    ) -> None:
        """Add a network; one that was not trained has a recipe of 0 steps."""
        of = [self.rows[k] for k in parents]
        name = f"{self.number:05d}-{self.kind}-{len(self.states):02d}"
        architecture = self.architecture if architecture is None else architecture
        number = self.number * FAMILY_SIZE + (0 if of_recipe else len(self.states))
        row = {
            "family": self.kind,
            "architecture": architecture,
            "dataset": task.name,
            "relation": relation,
            "parent": of[0][0] if of else None,
            "second_parent": of[1][0] if len(of) > 1 else None,
            "root": of[0][1]["root"] if of else name,
            "recipe": number,
            "generation": 1 + max(row["generation"] for _, row in of) if of else 0,
            "amount": amount,
            **recipe.row,
            "trained_steps": recipe.steps + (max(row["trained_steps"] for _, row in of) if of else 0),
            **score(architecture, state, task),
        }
        self.states.append(state)
        self.rows.append((name, row))

    def _from_scratch(self, relation: str, same_as: int | None) -> None:
        seed = self._own_seed()
        start = initial(self.architecture, seed)
        state, self.recipe = train(self.architecture, start, self.task, self.recipe, seed + 1, on_step=self._step)
        self._add(state, relation, self.task, self.recipe, of_recipe=True)

    def _fine_tune(self, parent: int, share: float, task: Task) -> None:
        recipe = replace(self.recipe, steps=max(1, round(share * self.recipe.steps)), lr=0.3 * self.recipe.lr)
        state, recipe = train(
            self.architecture, self.states[parent], task, recipe, self._own_seed(), on_step=self._step
        )  # fmt: skip
        self._add(state, "fine-tune", task, recipe, [parent], amount=share)

    def _change(self, parent: int, relation: str) -> None:
        untrained = replace(self.recipe, steps=0)
        if relation == "round":
            state, amount = rounded(self.states[parent]), 8.0
        else:
            amount = self.draws.choice((0.3, 0.5, 0.7))
            state = pruned(self.states[parent], amount)
        self._add(state, relation, self._task_of(parent), untrained, [parent], amount=amount)

    def _lora(self, parent: int) -> None:
        rank, task = self.draws.choice((1, 2, 4)), self.draws.choice((self.task, self._other_task()))
        recipe = replace(self.recipe, steps=max(1, round(0.3 * self.recipe.steps)), lr=0.5 * self.recipe.lr)
        state, recipe = train(
            self.architecture, self.states[parent], task, recipe, self._own_seed(), rank=rank, on_step=self._step
        )
        self._add(state, "lora", task, recipe, [parent], amount=float(rank))

    def _merge(self, one: int, other: int) -> None:
        untrained = replace(self.recipe, steps=0)
        state = averaged(self.states[one], self.states[other])
        self._add(state, "merge", self._task_of(one), untrained, [one, other], amount=0.5)

    def _new_head(self, parent: int) -> None:
        task = self._other_task()
        if task.loss == "classes" and task.outputs > 2:
            task = task.with_classes(self.draws.integer(2, task.outputs - 1))
        architecture = with_outputs(self.architecture, task.outputs)
        alone, seed = self.draws.integer(0, 1) == 0, self._own_seed()
        recipe = replace(self.recipe, steps=max(1, round(0.3 * self.recipe.steps)))
        start = with_new_head(self.states[parent], architecture, seed)
        state, recipe = train(architecture, start, task, recipe, seed + 1, head_only=alone, on_step=self._step)
        self._add(
            state, "head", task, recipe, [parent], amount=0.0 if alone else 0.3, architecture=architecture
        )  # fmt: skip


def verify(zoo: Zoo, networks: Sequence[int]) -> list[tuple[float, str]]:
    """Compare losses on the held-out examples of each network's data set with the column `test_loss`."""

    def measure(module: torch.nn.Module, row: Mapping[str, Any]) -> float:
        found = score(row["architecture"], state_of(module), find_task(row["dataset"]))["test_loss"]
        return float(found or 0.0)

    return compare(zoo, networks, build=lambda row: build(row["architecture"]), measure=measure, column="test_loss")
