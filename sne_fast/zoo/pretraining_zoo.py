"""`make_pretraining_zoo`: very many small networks, as different as possible, for training encoders without labels."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch

from .family_architectures import ARCHITECTURE_FAMILIES, Draws, draw_architecture
from .family_children import FamilyRecipe, State, initial, score, train
from .family_data import DATASETS, Task, find_task, tasks_of
from .family_zoo import HYPERPARAMETERS, TARGETS, check_architectures, recipe_for
from .making import Group, Made, make_zoo
from .random_weights import draw_distributions, draw_weights, near
from .table import Zoo

CLUSTER = 16
"""Networks of one architecture."""


def make_pretraining_zoo(
    folder: str | PathLike[str],
    clusters: int = 300,
    *,
    seed: int = 0,
    max_steps: int = 40,
    scale: float = 0.5,
    architectures: Sequence[str] | None = None,
    left_out: Sequence[str] = (),
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Make many small networks, half of them trained briefly, the others with weights of random distributions.

    Training without labels needs variety rather than good networks. A cluster is 16 networks of one architecture, drawn
    as :func:`make_family_zoo` draws them. In every second cluster no network is trained: each tensor of each network
    has a distribution of its own, more or less near to that of the cluster (tails, norms of units, means, a part of low
    rank, zeros). In the others, networks are trained on one data set with hyperparameters of their own, from fresh or
    random weights. After an interruption the same call makes what is missing.

    Args:
        folder: the folder of the files, made if missing; a finished zoo there is refused.
        clusters: number of clusters.
        seed: of everything that is drawn.
        max_steps: largest number of steps of a training.
        scale: factor of all widths; with 0.5, most networks have 500 to 10,000 weights.
        architectures: names from `family_architectures.ARCHITECTURE_FAMILIES`, all by default.
        left_out: data sets that no network is made for, or starts of their names, such as "digit-3".
        on_progress: called with the share done, in [0, 1].

    Returns:
        A zoo whose rows hold `family` (of architectures), `architecture` (JSON), `dataset`, `relation` ("random" or
        "brief"), the hyperparameters, `trained_steps`, `test_accuracy` (None for regression) and `test_loss`.

    Raises:
        ValueError: no clusters, an unknown architecture or one without a data set, a name in `left_out` that no data
            set has, or an unfinished zoo of other arguments.
        FileExistsError: `folder` holds a zoo already.
        ModuleNotFoundError: pyarrow, scikit-learn or mlxtend is missing.

    Example:
        >>> made = make_pretraining_zoo("pretraining", 2, max_steps=5, scale=0.2, architectures=["siren"])
        >>> len(made), made.rows[0]["relation"], made.rows[16]["relation"]
        (32, 'random', 'brief')
    """
    chosen = check_architectures("make_pretraining_zoo", architectures)
    if clusters < 1 or max_steps < 1:
        raise ValueError(
            f"make_pretraining_zoo: clusters and max_steps must be at least 1, got {clusters} and {max_steps}"
        )
    names = [name for groups in DATASETS.values() for group in groups for name in group]
    for start in left_out:
        if not any(name.startswith(start) for name in names):
            raise ValueError(f"make_pretraining_zoo: left_out: no data set has a name that starts with {start!r:.80}")
    tasks = {kind: tasks_of(ARCHITECTURE_FAMILIES[kind], left_out) for kind in chosen}
    for kind in (kind for kind, found in tasks.items() if not found):
        raise ValueError(f"make_pretraining_zoo: left_out leaves no data set for {kind}")
    groups = [Group(f"{k:05d}", k * CLUSTER, CLUSTER, float(k % 2 * 10 + 1)) for k in range(clusters)]

    def work(group: Group, on_share: Callable[[float], None]) -> list[Made]:
        number = group.first // CLUSTER
        kind = chosen[number // 2 % len(chosen)]
        return [_cluster(kind, number, tasks[kind], seed, max_steps, scale, on_share)]

    about = {
        "source": "families",
        "clusters": clusters,
        "architectures": chosen,
        "left_out": list(left_out),
        "seed": seed,
        "max_steps": max_steps,
        "scale": scale,
        "targets": list(TARGETS),
        "hyperparameters": list(HYPERPARAMETERS),
    }
    return make_zoo(folder, groups, work, about, on_progress)


def _cluster(
    kind: str,
    number: int,
    tasks: Sequence[Sequence[str]],
    seed: int,
    max_steps: int,
    scale: float,
    on_share: Callable[[float], None],
) -> Made:
    own_seed = zlib.crc32(f"{seed}/{number}/{kind}/pretraining".encode())
    draws = Draws(own_seed)
    task = find_task(draws.choice(draws.choice(tasks)))
    architecture = draw_architecture(kind, task, draws, scale)
    like = initial(architecture, own_seed)
    middle = draw_distributions(like, draws.generator)
    states: list[State] = []
    rows: list[tuple[str, dict[str, Any]]] = []
    for k in range(CLUSTER):
        brief = bool(number % 2)
        start_seed = zlib.crc32(f"{own_seed}/{k}".encode())
        recipe = recipe_for(kind, draws, max_steps if brief else 1, least=0.1)
        if brief and draws.integer(0, 1):
            state = initial(architecture, start_seed)
        else:
            own = near(middle, draws.log_number(0.05, 1.0), draws.generator)
            state = draw_weights(like, own, start_seed)
        if brief:
            state, recipe = train(architecture, state, task, recipe, start_seed + 1)
        else:
            recipe = FamilyRecipe(0, 0.0, 0.0, "none")
        states.append(state)
        rows.append((f"{number:05d}-{kind}-{k:02d}", _row(kind, architecture, task, recipe, brief, state)))
        on_share((k + 1) / CLUSTER)
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}, rows


def _row(kind: str, architecture: str, task: Task, recipe: FamilyRecipe, brief: bool, state: State) -> dict[str, Any]:
    return {
        "family": kind,
        "architecture": architecture,
        "dataset": task.name,
        "relation": "brief" if brief else "random",
        **recipe.row,
        "amount": None,
        "trained_steps": recipe.steps,
        **(score(architecture, state, task) if brief else {"test_accuracy": None, "test_loss": None}),
    }
