"""Retrieval of the original of a changed network: encoders beside statistics, spectra and random projections.

python bench/retrieval.py ZOO ... --model A --model B --learnt ZOO   # writes bench/results/retrieval.json
python bench/retrieval.py ... --mixed                                # writes bench/results/retrieval_mixed.json
python bench/retrieval.py --page                                     # writes the tables of docs/similarity.md

Zoos are those of `make_family_zoo` and `make_classifier_zoo`. The gallery of a zoo holds its networks that were trained
from scratch, with --mixed also those that the encoders learnt from. Queries are changed copies of those of the zoo:
with noise, pruned, with a new head, permuted, rounded, and the zoo's own fine-tuned children. A query is a hit if the
nearest network of the gallery is the one it was made of. Features of all methods are whitened by the gallery as
`sne_fast.similarity.nearest` does; the distance is 1 - cosine for encoders and random projections, and Euclidean for
the others. Beside each encoder stands one of the same seed that was not trained, as it is, and calibrated with the
networks of --learnt. The k-th model is measured with the k-th seed of queries.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from report import ROOT, insert

import sne_fast
from sne_fast.atomic_files import write_json
from sne_fast.data.batch import WeightBatch
from sne_fast.reports.machine import machine
from sne_fast.similarity import nearest
from sne_fast.symmetry import Symmetry, permute
from sne_fast.tasks.pretrain import PROBED, labels_of
from sne_fast.training import Views, calibrate, linear_probe
from sne_fast.training.contrastive import encode_in_pieces
from sne_fast.training.new_heads import with_new_heads
from sne_fast.training.views import with_noise, with_pruning, with_rounding
from sne_fast.zoo import Zoo
from sne_fast.zoo.statistics import layer_statistics
from sne_fast.zoo.symmetries import symmetries_of

Method = tuple[Callable[[WeightBatch], Tensor], bool]
"""Features of a batch, and whether their distance is that of cosines."""
Queries = tuple[WeightBatch, list[int]]
"""Changed networks, and for each the place in the gallery of the network it was made of."""
AT_ONCE = 150_000
RESULT = ROOT / "bench" / "results" / "retrieval.json"
MIXED = RESULT.with_name("retrieval_mixed.json")
PAGE = ROOT / "docs" / "similarity.md"
MARKERS = "<!-- retrieval:begin -->", "<!-- retrieval:end -->"


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


# ------------------------------------------------------------------------------------------------------------- measure


def recall(gallery: Tensor, features: Tensor, originals: list[int], cosine: bool) -> tuple[float, float]:
    """Return the shares of queries whose original is the nearest, and among the five nearest, of the gallery."""
    _, places = nearest(gallery, features, 5, metric="cosine" if cosine else "euclidean")
    hits = places == np.array(originals)[:, None]
    return float(hits[:, 0].mean()), float(hits.any(1).mean())


def probes(zoo: Zoo, features: Tensor) -> dict[str, float]:
    """Return how well a linear map of features predicts columns of a quarter of the roots and what was made of them."""
    roots = [row.get("root") or row["name"] for row in zoo.rows]
    held = torch.tensor([zlib.crc32(str(root).encode()) % 4 == 0 for root in roots])
    found = {}
    for name in (name for name in PROBED if name in zoo.columns):
        score = linear_probe(features, labels_of(zoo, name), ~held)
        if score == score:
            found[name] = round(score, 4)
    return found


def measure(zoo: Zoo, methods: Mapping[str, Method], encoder: sne_fast.SNE, others: Sequence[WeightBatch],
            known: frozenset[str], seed: int) -> dict[str, Any]:  # fmt: skip
    """Return recalls and probes of all methods on one zoo; `known` are families of architectures to count apart."""
    packed, roots = encoder.pack(zoo).detach(), from_scratch(zoo)
    found = queries(zoo, packed, symmetries_of(zoo), seed)
    gallery = WeightBatch.cat([packed[roots], *others])
    families = [zoo.rows[i]["family"] for i in roots]
    recalls: dict[str, dict[str, Any]] = {}
    probed: dict[str, dict[str, float]] = {}
    for method, (features, cosine) in methods.items():
        base = features(gallery)
        recalls[method] = {}
        for name, (batch, originals) in found.items():
            at = features(batch)
            parts = {"all": list(range(len(originals)))}
            if known:
                parts["never seen"] = [k for k, o in enumerate(originals) if families[o] not in known]
            recalls[method][name] = {
                part: [round(r, 4) for r in recall(base, at[rows], [originals[k] for k in rows], cosine)]
                for part, rows in parts.items()
                if rows
            }
        probed[method] = probes(zoo, features(packed))
    counts = {name: len(originals) for name, (_, originals) in found.items()}
    return {"gallery": len(gallery), "queries": counts, "recall": recalls, "probes": probed}


def table(tables: Mapping[str, Sequence[Mapping[str, Any]]], part: str, rank: int) -> list[str]:
    """Return a table in Markdown for each zoo: means over seeds of recalls at 1 (rank 0) or 5 (rank 1)."""
    lines = []
    for zoo, runs in tables.items():
        names = [name for name, parts in runs[0]["recall"]["SNE"].items() if part in parts]
        if not names:
            continue
        methods = list(runs[0]["recall"])
        lines += ["", f"| `{zoo}`, {part}, {runs[0]['gallery']} in the gallery | {' | '.join(methods)} |"]
        lines += ["|---|" + "---:|" * len(methods)]
        for name in names:
            means = [np.mean([run["recall"][method][name][part][rank] for run in runs]) for method in methods]
            lines.append(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return lines


def write_page() -> None:
    """Write the tables of docs/similarity.md from the committed result."""
    found = json.loads(RESULT.read_text())
    lines = [*table(found["zoos"], "all", 0), *table(found["zoos"], "never seen", 0)]
    for zoo, runs in found["zoos"].items():
        methods = list(runs[0]["probes"])
        lines += ["", f"| `{zoo}`, linear probes | {' | '.join(methods)} |", "|---|" + "---:|" * len(methods)]
        for name in runs[0]["probes"]["SNE"]:
            means = [np.mean([run["probes"][method].get(name, np.nan) for run in runs]) for method in methods]
            lines.append(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    insert(PAGE, "\n".join([*lines, "", ""]), *MARKERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="*")
    parser.add_argument("--model", action="append", default=[], help="of one seed, by default sne-small; repeat")
    parser.add_argument("--learnt", type=Path, action="append", default=[], help="a zoo that the encoders learnt from")
    parser.add_argument("--mixed", action="store_true", help="put the networks of --learnt into the galleries too")
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/similarity.md")
    options = parser.parse_args()
    if options.page:
        write_page()
        return
    torch.set_num_threads(1)
    zoos = [Zoo.open(path) for path in options.zoo]
    shared = [Zoo.open(path) for path in options.learnt]
    known = frozenset(row["family"] for zoo in shared for row in zoo.rows)
    tables: dict[str, list[dict[str, Any]]] = {path.name: [] for path in options.zoo}
    models = options.model or ["sne-small"]
    for seed, model in enumerate(models):
        encoder = sne_fast.SNE.from_pretrained(model)
        learnt = [encoder.pack(zoo[from_scratch(zoo)]).detach() for zoo in shared]
        torch.manual_seed(seed)
        untrained = sne_fast.SNE(**encoder.config).eval()
        untrained.set_statistics(WeightBatch.cat(learnt or [encoder.pack(zoos[0]).detach()]))
        methods: dict[str, Method] = {"SNE": (encoded(encoder), True), "untrained": (encoded(untrained), True)}
        if learnt:
            calibrated = copy.deepcopy(untrained)
            views = Views([symmetry for zoo in shared for symmetry in symmetries_of(zoo[from_scratch(zoo)])])
            calibrate(calibrated, WeightBatch.cat(learnt), views, seed=seed)
            methods["untrained, calibrated"] = encoded(calibrated), True
        methods |= {
            "23 statistics": (statistics, False),
            "plain statistics": (plain_statistics, False),
            "spectra": (spectra, False),
            "random projection": (random_projection, True),
        }
        for path, zoo in zip(options.zoo, zoos, strict=True):
            tables[path.name].append(measure(zoo, methods, encoder, learnt if options.mixed else [], known, seed))
            for method, rows in tables[path.name][-1]["recall"].items():
                scores = ", ".join(f"{name} {parts['all'][0]:.2f}" for name, parts in rows.items())
                print(f"{path.name}, seed {seed}, {method}: {scores}", flush=True)
    about = {path.name: zoo.about for path, zoo in zip(options.zoo, zoos, strict=True)}
    write_json(
        MIXED if options.mixed else RESULT,
        {"models": models, "about": about, "zoos": tables, "machine": machine()},
    )


if __name__ == "__main__":
    main()
