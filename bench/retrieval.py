"""Retrieval of the original of a changed network: encoders beside statistics, spectra and random projections.

python bench/retrieval.py ZOO ... --train ZOO --train ZOO -o FOLDER     # trains an encoder, then measures
python bench/retrieval.py ZOO ... --model FOLDER/encoder                # measures one that is trained

Zoos are those of `make_family_zoo` and `make_classifier_zoo`. The gallery of a zoo holds its networks that were trained
from scratch, and with --train those of the training zoos. Queries are changed copies of those of the zoo: with noise,
pruned, with a new head, permuted, rounded, and the zoo's own fine-tuned children. A query is a hit if the nearest
network of the gallery is the one it was made of. Features of all methods are whitened by the gallery as
`sne_fast.similarity.nearest` does; the distance is 1 - cosine for encoders and random projections, and Euclidean for
the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sne_fast
from sne_fast.atomic_files import write_json
from sne_fast.data.batch import WeightBatch
from sne_fast.reports.machine import machine
from sne_fast.similarity import nearest
from sne_fast.symmetry import Symmetry, permute
from sne_fast.training import (
    Contrastive,
    ContrastiveModel,
    FitSettings,
    History,
    fit_contrastive,
    linear_probe,
)
from sne_fast.training.contrastive import encode_in_pieces
from sne_fast.training.new_heads import with_new_heads
from sne_fast.training.views import Views, with_noise, with_pruning, with_rounding
from sne_fast.zoo import Zoo
from sne_fast.zoo.statistics import layer_statistics
from sne_fast.zoo.symmetries import symmetries_of

Queries = tuple[WeightBatch, list[int]]
"""Changed networks, and for each the place in the gallery of the network it was made of."""
AT_ONCE = 150_000


def queries(zoo: Zoo, packed: WeightBatch, symmetries: list[Symmetry], seed: int) -> dict[str, Queries]:
    """Return the queries of every row of the table."""
    rows, roots = list(zoo.rows), from_scratch(zoo)
    place = {rows[i]["name"]: k for k, i in enumerate(roots)}
    base, own = packed[roots], [symmetries[i] for i in roots]
    n, everything = len(roots), list(range(len(roots)))

    def g() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def all_of(amount: float) -> Tensor:
        return torch.full((n,), amount, dtype=torch.float64)

    yes, no = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    permuted = permute(base, own, g())
    found: dict[str, Queries] = {
        "noise 10 %": (with_noise(base, all_of(0.1), g()), everything),
        "noise 30 %": (with_noise(base, all_of(0.3), g()), everything),
        "pruned 30 %": (with_pruning(base, all_of(0.3)), everything),
        "pruned 50 %": (with_pruning(base, all_of(0.5)), everything),
        "8-bit": (with_rounding(base, yes), everything),
        "new head": (with_new_heads(base, yes, no, g()), everything),
        "new head of another size": (with_new_heads(base, yes, yes, g()), everything),
        "permuted": (permuted, everything),
        "permuted, noise 10 %": (with_noise(permuted, all_of(0.1), g()), everything),
        "permuted, new head": (with_new_heads(permuted, yes, no, g()), everything),
    }
    if "relation" not in zoo.columns:
        return found
    for share in (0.01, 0.1, 1.0):
        chosen = [
            i for i, row in enumerate(rows)
            if row["relation"] == "fine-tune" and row["amount"] == share and row["parent"] in place
        ]  # fmt: skip
        originals = [place[rows[i]["parent"]] for i in chosen]
        found[f"fine-tuned {share:.0%}"] = packed[chosen], originals
        if share == 0.1:
            mixed = permute(packed[chosen], [symmetries[i] for i in chosen], g())
            found["permuted, fine-tuned 10 %"] = mixed, originals
    for relation, name in (("lora", "LoRA"), ("head", "new head, trained")):
        chosen = [i for i, row in enumerate(rows) if row["relation"] == relation and row["parent"] in place]
        found[name] = packed[chosen], [place[rows[i]["parent"]] for i in chosen]
    return found


def from_scratch(zoo: Zoo) -> list[int]:
    """Return the places of the networks that were not made of others."""
    return [i for i, row in enumerate(zoo.rows) if row.get("parent") is None]


# ------------------------------------------------------------------------------------------------------------ features


def stored(batch: WeightBatch) -> list[Tensor]:
    """Return the weights of each network as they were before packing divided them."""
    sizes = batch.chunk_ptr[batch.tensor_ptr].diff()
    values = batch.values * batch.tensor_scale.repeat_interleave(sizes).to(batch.values)
    return list(values.split(batch.network_sizes.tolist()))


def statistics(batch: WeightBatch) -> Tensor:
    """Return layer statistics of the first four and last two layers, as relative numbers."""
    return torch.from_numpy(np.nan_to_num(layer_statistics(batch, layers=4, statistics="all"), nan=-9.0))


def plain_statistics(batch: WeightBatch) -> Tensor:
    """Return means, variances and quantiles of the first four and last two layers."""
    return torch.from_numpy(np.nan_to_num(layer_statistics(batch, layers=4), nan=-9.0))


def random_projection(batch: WeightBatch) -> Tensor:
    """Return a random projection of the flat weights, another for every number of weights."""
    found = []
    for weights in stored(batch):
        g = torch.Generator().manual_seed(len(weights))
        projection = torch.randn(64, len(weights), generator=g)
        found.append(projection @ weights / weights.norm())
    return torch.stack(found).double()


def spectra(batch: WeightBatch) -> Tensor:
    """Return nine quantiles of the logarithms of the singular values of the first four and last two matrices."""
    found = []
    levels = torch.linspace(0, 1, 9, dtype=torch.float64)
    for weights, shapes, k in zip(stored(batch), batch.shapes, range(len(batch)), strict=True):
        first, last = batch.network_ptr_host[k : k + 2].tolist()
        kernels = batch.kernels[int(batch.layer_ptr_host[first]) : int(batch.layer_ptr_host[last])].tolist()
        matrices = []
        for t, shape, kernel in zip(weights.split([int(np.prod(s)) for s in shapes]), shapes, kernels, strict=True):
            if len(shape) >= 2:
                matrix = t.view(-1, shape[0], shape[1]).permute(1, 2, 0).reshape(shape[0], -1) if kernel else None
                matrices.append(t.view(-1, shape[-1]) if matrix is None else matrix)
        rows = []
        for m in [*matrices[:4], *[torch.zeros(1, 1)] * (4 - len(matrices)), *matrices[-2:]]:
            rows.append(torch.linalg.svdvals(m.double()).clamp_min(1e-6).log().quantile(levels))
        found.append(torch.cat([*rows, *[torch.zeros(9)] * (6 - len(rows))]))
    return torch.stack(found)


def encoded(encode: Callable[[WeightBatch], Tensor]) -> Callable[[WeightBatch], Tensor]:
    """Return the features that an encoder gives."""

    def features(batch: WeightBatch) -> Tensor:
        with torch.no_grad():
            return encode_in_pieces(encode, batch, AT_ONCE).double()

    return features


# ------------------------------------------------------------------------------------------------------------ training


def train_encoder(zoos: list[Zoo], options: argparse.Namespace, report: Callable[[str], None]) -> ContrastiveModel:
    """Train an encoder on zoos without labels."""
    torch.manual_seed(options.seed)
    encoder = sne_fast.SNE(
        hidden_dim=options.hidden_dim, statistics="relative", set_attention=options.set_attention, num_inducing=16,
        chunks=not options.no_chunks,
    )  # fmt: skip
    encoder.fill_code_gains(1.0)
    model = ContrastiveModel(encoder)
    batch = WeightBatch.cat([encoder.pack(zoo).detach() for zoo in zoos])
    encoder.set_statistics(batch)
    rows_of_all = [(k, row) for k, zoo in enumerate(zoos) for row in zoo.rows]
    roots = [(k, row.get("root", row["name"])) for k, row in rows_of_all]
    groups = torch.tensor([roots.index(root) for root in roots])
    symmetries = [symmetry for zoo in zoos for symmetry in symmetries_of(zoo)]
    objective = Contrastive(
        model, Views(symmetries), groups=groups, relatives=options.relatives, max_chunks=options.max_chunks,
        temperature=options.temperature, weights_at_once=AT_ONCE,
    )  # fmt: skip
    families = [row["family"] for _, row in rows_of_all]
    clusters = [row["architecture"] for _, row in rows_of_all]
    kinds = torch.tensor([sorted(set(families)).index(family) for family in families])
    steps = [float(row.get("trained_steps", row["steps"])) for _, row in rows_of_all]
    labels = {"steps": torch.tensor(steps).log1p(), "family": kinds}
    in_train = groups % 4 != 0
    start = time.process_time()

    def on_epoch(epoch: int, history: History) -> None:
        line = f"epoch {epoch}: loss {history.train_loss[-1]:.3f}, {time.process_time() - start:.0f} CPU s"
        if epoch % 5 == 4 or epoch + 1 == options.epochs:
            z = encoded(encoder)(batch)
            probes = ", ".join(f"{name} {linear_probe(z, y, in_train):.2f}" for name, y in labels.items())
            line += f", linear probes {probes}"
        report(line)

    settings = FitSettings(
        epochs=options.epochs, lr=options.lr, batch_weights=options.batch_weights, seed=options.seed
    )  # fmt: skip
    fit_contrastive(
        model, batch, objective, settings, clusters=clusters, checkpoint=options.out / "fit.pt", on_epoch=on_epoch
    )  # fmt: skip
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- measure


def recall(gallery: Tensor, features: Tensor, originals: list[int], cosine: bool) -> tuple[float, float]:
    """Return the shares of queries whose original is the nearest, and among the five nearest, of the gallery."""
    _, places = nearest(gallery, features, 5, metric="cosine" if cosine else "euclidean")
    hits = places == np.array(originals)[:, None]
    return float(hits[:, 0].mean()), float(hits.any(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="+")
    parser.add_argument("--train", type=Path, action="append", default=[])
    parser.add_argument("--model", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("retrieval"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--batch-weights", type=int, default=1_000_000)
    parser.add_argument("--set-attention", choices=("sab", "isab"), default="isab")
    parser.add_argument("--max-chunks", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--relatives", type=float, default=0.0)
    parser.add_argument("--no-chunks", action="store_true")
    parser.add_argument("--no-baselines", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        print(line, flush=True)

    methods: dict[str, tuple[Callable[[WeightBatch], Tensor], bool]] = {}
    train = [Zoo.open(path) for path in options.train]
    if options.model is not None:
        encoder = sne_fast.SNE.from_pretrained(options.model)
        methods["SNE"] = encoded(encoder), True
    elif train:
        model = train_encoder(train, options, report)
        model.encoder.save_pretrained(options.out / "encoder")
        encoder = model.encoder
        methods["SNE"] = encoded(encoder), True
        methods["SNE, projected"] = encoded(lambda batch: model.project(model.encoder(batch))), True
    else:
        parser.error("give --train or --model")
    if not options.no_baselines:
        torch.manual_seed(options.seed)
        untrained = sne_fast.SNE(**encoder.config).eval()
        seen = train or [Zoo.open(options.zoo[0])]
        untrained.set_statistics(WeightBatch.cat([encoder.pack(zoo).detach() for zoo in seen]))
        methods["SNE, untrained"] = encoded(untrained), True
        methods["statistics, 23"] = statistics, False
        methods["statistics, plain"] = plain_statistics, False
        methods["spectra"] = spectra, False
        methods["random projection"] = random_projection, True
    known = {row["family"] for zoo in train for row in zoo.rows}
    others = [encoder.pack(zoo[from_scratch(zoo)]).detach() for zoo in train]
    tables: dict[str, Any] = {}
    for path in options.zoo:
        zoo = Zoo.open(path)
        packed, roots = encoder.pack(zoo).detach(), from_scratch(zoo)
        found = queries(zoo, packed, symmetries_of(zoo), options.seed)
        gallery = WeightBatch.cat([packed[roots], *others])
        families = [zoo.rows[i]["family"] for i in roots]
        table: dict[str, dict[str, Any]] = {}
        for method, (features, cosine) in methods.items():
            start = time.process_time()
            base = features(gallery)
            table[method] = {}
            for name, (batch, originals) in found.items():
                at = features(batch)
                parts = {"all": list(range(len(originals)))}
                if known:
                    parts["never seen"] = [k for k, o in enumerate(originals) if families[o] not in known]
                table[method][name] = {
                    part: [round(r, 4) for r in recall(base, at[rows], [originals[k] for k in rows], cosine)]
                    for part, rows in parts.items()
                    if rows
                }
            line = ", ".join(f"{name} {scores['all'][0]:.2f}" for name, scores in table[method].items())
            report(f"{path.name}, {method} ({time.process_time() - start:.0f} CPU s): {line}")
        counts = {name: len(originals) for name, (_, originals) in found.items()}
        tables[path.name] = {"gallery": len(gallery), "queries": counts, "recall": table}
    shown = {name: value for name, value in vars(options).items() if not isinstance(value, (Path, list))}
    result = {"options": shown, "zoos": tables, "log": said, "machine": machine()}
    write_json(options.out / "retrieval.json", result)


if __name__ == "__main__":
    main()
