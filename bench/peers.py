"""Speed and predictions of SNE beside peers, on one zoo of convolutional networks with their accuracies.

python bench/peers.py ZOO -o RUNS --quality    # trains every method for every seed, save what is in RUNS already
python bench/peers.py ZOO -o RUNS --speed      # times one pass of training and of encoding, in turn
python bench/peers.py ZOO -o RUNS --report     # writes bench/results/peers.json
python bench/peers.py ZOO -o RUNS --page       # writes the table of docs/benchmarks.md from it

ZOO is a zoo of `make_classifier_zoo` with one architecture, such as `zoos/digits` of `sne-fast task accuracy`. All
methods learn from the same training networks, choose their epoch by the same validation networks, and are tested on the
rest.

Peers are NFN (PyPI's `nfn`, by its authors), a plain transformer over chunks, DeepSets, and boosted trees on statistics
of layers. Speed is networks per second, the median of rounds in which methods run in turn: in training a pass over the
training networks, forward, backward and step of the optimiser in batches as each method is trained, without its
validation; in encoding the predictions for all networks. Statistics of tensors, which training reads once per network,
count in encoding. Trees are timed from the statistics to the fitted trees. Times are of `--threads` threads.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from report import ROOT, insert

from sne_fast import pack, tensor_statistics
from sne_fast.atomic_files import write_json
from sne_fast.data.batch import WeightBatch
from sne_fast.data.choices import Scale
from sne_fast.data.weight_budgets import stratified_split
from sne_fast.nn.predictor import Predictor, PredictorHead
from sne_fast.reports.machine import machine, processor
from sne_fast.reports.measures import measures
from sne_fast.reports.paired import PairedRun, paired_difference
from sne_fast.tasks.baselines import BASELINES, Problem
from sne_fast.tasks.baselines.neural import Neural
from sne_fast.training import RECIPES, TrainingRecipe, fit, make_predictor, predict
from sne_fast.training.optimiser import adamw
from sne_fast.training.settings import AmpDtype
from sne_fast.zoo import Zoo
from sne_fast.zoo.splits import SHARES

RESULT = ROOT / "bench" / "results" / "peers.json"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKERS = "<!-- peers:begin -->", "<!-- peers:end -->"
REFERENCE = "layer statistics, boosted trees"
TARGET = "test_accuracy"


class ChunksTransformer(nn.Module):
    """A transformer over the chunks of a network: chunks as tokens of one width, two layers, mean, and an MLP.

    Tokens are a linear map of the values of a chunk, padded with zeros, plus codes that are learnt of the tensor and of
    the place in it. Networks are of one architecture.

    Args:
        known: the training networks.
        outputs: number of outputs.
        width: of the tokens.
        depth: number of layers.
    """

    scale: Tensor

    def __init__(self, known: WeightBatch, outputs: int = 1, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tensors = len(known.tensor_scale) // len(known)
        self.chunks = (len(known.chunk_ptr) - 1) // len(known)
        per_tensor = known.tensor_ptr_host[: self.tensors + 1].diff()
        self.register_buffer("scale", known.tensor_scale.view(len(known), -1).square().mean(0).sqrt())
        self.register_buffer("tensor", torch.arange(self.tensors).repeat_interleave(per_tensor), persistent=False)
        self.embed = nn.Linear(known.chunk_size, width)
        self.codes = nn.Parameter(0.02 * torch.randn(self.chunks, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = PredictorHead(width, outputs)

    def tokens(self, batch: WeightBatch) -> Tensor:
        """Return the padded chunks of networks, `(B, chunks, chunk_size)`, with the levels of their tensors."""
        sizes = batch.chunk_ptr.diff()
        columns = torch.arange(batch.chunk_size, device=batch.device)
        mask = columns < sizes[:, None]
        padded = torch.zeros(len(sizes), batch.chunk_size, device=batch.device).masked_scatter(mask, batch.values)
        levels = batch.tensor_scale.view(len(batch), -1) / self.scale
        return padded.view(len(batch), self.chunks, -1) * levels[:, self.tensor, None]

    def forward(self, batch: WeightBatch) -> Tensor:
        """Return the outputs of each network, `(B, outputs)`."""
        return self.head(self.layers(self.embed(self.tokens(batch)) + self.codes).mean(1))


class Transformer(Neural):
    """A plain transformer over chunks."""

    name = "transformer over chunks"
    module = ChunksTransformer


NEURAL: dict[str, Neural] = {
    "NFN": BASELINES["nfn"],  # type: ignore[dict-item]
    "DeepSets": BASELINES["deepsets"],  # type: ignore[dict-item]
    "transformer over chunks": Transformer(epochs=70),
}
TREES = {
    name: BASELINES[key]
    for name, key in ((REFERENCE, "statistics"), ("the 23 statistics, boosted trees", "statistics_rich"))
}


@dataclass(frozen=True)
class Row:
    """A row of the table that is SNE."""

    recipe: TrainingRecipe
    amp: AmpDtype | None = None


_CHUNKS = RECIPES["best"].replace(chunks=True, input_scale="zoo")
SNE: dict[str, Row] = {
    "SNE, statistics": Row(RECIPES["best"]),
    # Of networks without chunks a step is mostly the cost of its operations, whatever they work on.
    "SNE, statistics, large batches": Row(RECIPES["best"].replace(batch_weights=80_000, lr=2e-3)),
    "SNE, chunks and statistics, h = 32": Row(_CHUNKS),
    "SNE, chunks and statistics, h = 32, bfloat16": Row(_CHUNKS, "bfloat16"),
    "SNE, chunks and statistics, h = 64": Row(_CHUNKS.replace(hidden_dim=64)),
    "SNE, chunks and statistics, h = 64, bfloat16": Row(_CHUNKS.replace(hidden_dim=64), "bfloat16"),
}
METHODS = (*SNE, *NEURAL, *TREES)


class Data:
    """The zoo as every method reads it."""

    def __init__(self, path: Path) -> None:
        self.zoo = Zoo.open(path)
        self.targets = self.zoo.column(TARGET).astype(np.float64)
        self.groups = [str(name) for name in self.zoo.column("architecture")]
        self._packed: dict[Scale, WeightBatch] = {}

    def packed(self, scale: Scale) -> WeightBatch:
        if scale not in self._packed:
            self._packed[scale] = pack(self.zoo, _CHUNKS.chunk_size, scale=scale).detach()
        return self._packed[scale]

    def parts(self, seed: int) -> dict[str, list[int]]:
        names = ("train", "validation", "test")
        return dict(zip(names, (list(part) for part in stratified_split(self.groups, SHARES, seed)), strict=True))

    def problem(self, seed: int) -> Problem:
        parts = self.parts(seed)
        return Problem(self.packed("tensor"), self.targets, parts["train"], parts["validation"], seed, logit=True)


def predictor_of(row: Row, seed: int) -> Predictor:
    return make_predictor(row.recipe, [TARGET], transform="logit", seed=seed)


def trained(row: Row, data: Data, parts: dict[str, list[int]], seed: int, epochs: int | None = None) -> Predictor:
    """Train SNE as a recipe says, with validation networks if there are some."""
    predictor = predictor_of(row, seed)
    batch, targets = data.packed(row.recipe.scale), torch.tensor(data.targets, dtype=torch.float32)[:, None]
    recipe = row.recipe if epochs is None else row.recipe.replace(epochs=epochs)
    watched = parts["validation"]
    fit(
        predictor, batch[parts["train"]], targets[parts["train"]], recipe.fit_settings(seed, row.amp),
        validation=(batch[watched], targets[watched]) if watched else None,
    )  # fmt: skip
    return predictor


def predictions(method: str, data: Data, seed: int) -> np.ndarray:
    """Train a method and return its predictions for all networks."""
    if method in SNE:
        row = SNE[method]
        predictor = trained(row, data, data.parts(seed), seed)
        settings = row.recipe.fit_settings(seed, row.amp)
        return predict(predictor, data.packed(row.recipe.scale), settings=settings)[0][:, 0].double().numpy()
    return (NEURAL.get(method) or TREES[method]).fit_predict(data.problem(seed))


def quality(data: Data, folder: Path, seeds: Sequence[int], methods: Sequence[str]) -> None:
    """Train all methods that are not there yet, and write their predictions for the test networks."""
    for seed in seeds:
        test = data.parts(seed)["test"]
        for method in methods:
            path = folder / f"{re.sub('[^a-z0-9]+', '-', method.lower())}-seed{seed}.json"
            if path.exists():
                continue
            start = time.perf_counter()
            found = predictions(method, data, seed)[test]
            seconds = time.perf_counter() - start
            scores = measures(found, data.targets[test])
            run = {"method": method, "seed": seed, "predicted": found.tolist(), "measures": scores, "seconds": seconds}
            write_json(path, run)
            print(
                f"{method}, seed {seed}: tau {scores['tau']:.3f}, R2 {scores['r2']:.3f} ({seconds:.0f} s)", flush=True
            )


def one_pass(baseline: Neural, model: nn.Module, batch: WeightBatch, goals: Tensor) -> None:
    """Train a module of a baseline on every network once."""
    optimiser = adamw(model, baseline.lr, baseline.weight_decay)
    for places in torch.randperm(len(batch)).split(baseline.batch_size):
        loss = nn.functional.mse_loss(model(batch[places.tolist()])[:, 0], goals[places])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), baseline.clip)
        optimiser.step()


def fresh(batch: WeightBatch) -> WeightBatch:
    """Return the batch without the statistics that it keeps."""
    return batch.with_fields(values=batch.values.clone())


def passes(method: str, data: Data) -> tuple[Callable[[], object], Callable[[], object], int]:
    """Return one pass of training, one of encoding, and how many networks the first takes."""
    parts = data.parts(0)
    if method in SNE:
        row = SNE[method]
        predictor, settings = predictor_of(row, 0), row.recipe.fit_settings(0, row.amp)
        batch = data.packed(row.recipe.scale)
        alone = {**parts, "validation": []}
        tensor_statistics(batch)  # once per network and kept in the batch, as in a training of many epochs
        return (
            lambda: trained(row, data, alone, 0, epochs=1),
            lambda: predict(predictor, fresh(batch), settings=settings),
            len(parts["train"]),
        )
    problem = data.problem(0)
    if method in TREES:
        return lambda: TREES[method].fit_predict(problem), lambda: None, len(problem.train)
    baseline = NEURAL[method]
    known = problem.batch[list(problem.train)]
    model = baseline.module(known, 1)
    goals = torch.tensor(data.targets[list(problem.train)], dtype=torch.float32)

    def encode() -> None:
        with torch.no_grad():
            for i in range(0, len(problem.batch), baseline.batch_size):
                model(problem.batch[i : i + baseline.batch_size])

    return lambda: one_pass(baseline, model, known, goals), encode, len(known)


def speed(data: Data, folder: Path, threads: int, rounds: int, methods: Sequence[str]) -> None:
    """Time a pass of training and of encoding of every method, in turn, and write networks per second."""
    torch.set_num_threads(threads)
    runs = {method: passes(method, data) for method in methods}
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for k in range(rounds + 1):
        for method, (train, encode, _) in runs.items():
            start = time.perf_counter()
            train()
            between = time.perf_counter()
            encode()
            if k:  # the first round warms up
                times[method].append((between - start, time.perf_counter() - between))
    found: dict[str, Any] = {}
    for method, taken in times.items():
        training, encoding = (
            [networks / t[k] for t in taken] for k, networks in ((0, runs[method][2]), (1, len(data.zoo)))
        )
        found[method] = {"training": median(training), "training_range": [min(training), max(training)]}
        if method not in TREES:
            found[method] |= {"encoding": median(encoding), "encoding_range": [min(encoding), max(encoding)]}
        print(method, found[method], flush=True)
    about = {"threads": threads, "rounds": rounds, "networks_per_second": found, "machine": machine()}
    write_json(folder / f"speed-{threads}.json", about)


def report(data: Data, folder: Path) -> dict[str, Any]:
    """Return what is in a folder of runs: measures, paired differences and speeds by method."""
    runs: dict[str, dict[int, Any]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["method"], {})[run["seed"]] = run
    rows: dict[str, Any] = {}
    for method in METHODS:
        own = runs.get(method, {})
        rows[method] = {"seeds": sorted(own), "seconds": median([r["seconds"] for r in own.values()] or [float("nan")])}
        for name in ("tau", "r2", "mae"):
            values = [run["measures"][name] for run in own.values()]
            rows[method][name] = [float(np.mean(values)), float(np.std(values, ddof=1))] if len(values) > 1 else values
        for against in (REFERENCE, method.removesuffix(", bfloat16")):
            if against == method:
                continue
            pairs = []
            for seed in sorted(set(own) & set(runs.get(against, {}))):
                test = data.parts(seed)["test"]
                sides = (np.array(runs[m][seed]["predicted"]) for m in (method, against))
                pairs.append(PairedRun(np.array(test), data.targets[test], *sides))
            if pairs and (difference := paired_difference(pairs, "tau")) is not None:
                rows[method][f"tau minus that of {against}"] = [difference.mean, difference.standard_error]
    speeds = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("speed-*.json"))}
    for found in speeds.values():
        for method, rates in found["networks_per_second"].items():
            rows[method][f"{found['threads']} threads"] = rates
    return {
        "zoo": {"networks": len(data.zoo), "weights": data.packed("tensor").num_weights, **data.zoo.about},
        "methods": rows,
        "speed": {
            name: {k: v for k, v in found.items() if k != "networks_per_second"} for name, found in speeds.items()
        },
        "machine": machine(),
        "device": processor(),
    }


def write_page() -> None:
    """Write the table of docs/benchmarks.md from the result."""
    found = json.loads(RESULT.read_text())
    lines = [
        "",
        "| | training, networks/s | encoding, networks/s | tau | tau minus that of trees | R2 |",
        "|---|" + "---:|" * 5,
    ]
    for method, row in found["methods"].items():
        rates = next((row[key] for key in sorted(row) if key.endswith(" threads")), {})
        cells = [f"{rates[key]:,.0f}" if key in rates else "-" for key in ("training", "encoding")]
        if not row["tau"]:
            continue
        difference = row.get(f"tau minus that of {REFERENCE}")
        lines.append(
            f"| {method} | {' | '.join(cells)} | {spread(row['tau'])} | {spread(difference)} | {spread(row['r2'])} |"
        )
    insert(PAGE, "\n".join([*lines, "", ""]), *MARKERS)


def spread(mean_and_error: Sequence[float] | None) -> str:
    """Return a mean and what it may be off by as they stand in the table."""
    return " ± ".join(f"{number:.3f}" for number in mean_and_error or ()) or "-"


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = Data(options.zoo)
    if options.quality:
        quality(data, options.out, options.seeds, options.methods)
    if options.speed:
        speed(data, options.out, options.threads, options.rounds, options.methods)
    if options.report:
        write_json(RESULT, report(data, options.out))
    if options.page:
        write_page()


if __name__ == "__main__":
    main()
