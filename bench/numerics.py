"""Errors of the CPU backend over random encoders and networks, against float64.

python bench/numerics.py                      # 2,000 configurations, single thread; bench/results/cpu_numerics.json
python bench/numerics.py --count 60 --show    # a few, printed and not written

A configuration draws width, heads, chunk size, layer norm, dtype, scale, set attention (with few or many inducing
points), a few tensors of ragged lengths, and the size of the weights, from 1e-6 to 1e6. Compared are the vectors z and
the gradients of a random linear function of them: of the weights and of every parameter of the encoder. The truth is
the reference backend in float64, on the same encoder and weights. An error is ||got - want|| / ||want||, for gradients
over all parameters of one attention block, or all weights: some gradients, as that of every fc_k.bias, are exactly
zero, and have no size of their own.

The bounds are 2e-5 for z and 1e-4 for gradients in float32. Where the problem itself is ill-conditioned, float32 loses
more whatever computes it: softmaxes of large logits are decided by their last bits. So beyond the bounds an error is
compared with what eager PyTorch, the reference backend in the same dtype, loses on the same encoder: as it is, and with
every weight and parameter left or moved to one of its two neighbours at random, up to 12 times. Twice the largest of
these losses is allowed. In float64 the bounds are 1e-11 and 1e-9, in half types one rounding; there the same comparison
holds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import multiprocessing
import random
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sne_fast
from sne_fast.atomic_files import write_text
from sne_fast.backends.cpu import library
from sne_fast.reports.machine import processor, revision, versions

Json = dict[str, Any]
RESULT = Path(__file__).parent / "results" / "cpu_numerics.json"
BOUNDS = {
    torch.float32: (2e-5, 1e-4),
    torch.float64: (1e-11, 1e-9),
    torch.float16: (2.0**-11, 2.0**-11),
    torch.bfloat16: (2.0**-8, 2.0**-8),
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in BOUNDS}
DRAWS = 12
TINY = 1e-300


@dataclass(frozen=True)
class Configuration:
    """One encoder and one batch of networks, all drawn from ``seed``."""

    seed: int
    width: int
    heads: int
    chunk_size: int
    layer_norm: bool
    dtype: str
    scale: str
    set_attention: str
    num_inducing: int
    size: float
    shapes: tuple[tuple[tuple[int, ...], ...], ...]  # networks, tensors

    @classmethod
    def draw(cls, seed: int) -> Configuration:
        """Draw a configuration."""
        r = random.Random(seed)
        width = r.choices((32, 64, 128, 256), (10, 7, 2, 1))[0]
        heads = r.choice([n for n in (1, 2, 4, 8, 16, 32) if 8 <= width // n <= 64])
        longest = r.choice((1, 2, 7, 16, 32, 33, 64, 128))
        networks = tuple(
            tuple(
                (r.randint(1, 2 * longest + 3),) if r.random() < 0.4 else (r.randint(1, 12), r.randint(1, 24))
                for _ in range(r.randint(1, 4))
            )
            for _ in range(r.randint(1, 3))
        )
        return cls(
            seed=seed,
            width=width,
            heads=heads,
            chunk_size=longest,
            layer_norm=r.random() < 0.5,
            dtype=r.choices(tuple(DTYPES), (8, 1, 1, 1))[0],
            scale=r.choice(("none", "none", "tensor")),
            set_attention=r.choice(("sab", "isab")),
            num_inducing=r.choice((1, 4, 32)),
            size=10 ** r.uniform(-6, 6),
            shapes=networks,
        )

    def build(self) -> tuple[sne_fast.SNE, list[dict[str, Tensor]]]:
        """Return the encoder and the networks, both with numbers that their dtype holds."""
        torch.manual_seed(self.seed)
        dtype = DTYPES[self.dtype]
        encoder = sne_fast.SNE(
            hidden_dim=self.width,
            num_heads=self.heads,
            chunk_size=self.chunk_size,
            layer_norm=self.layer_norm,
            scale=self.scale,
            set_attention=self.set_attention,
            num_inducing=self.num_inducing,
        )
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)  # as after training, not at their start
        # Half types end at 65504, and at 6e-5 before they lose digits.
        size = min(max(self.size, 1e-3), 1e3) if dtype == torch.float16 else self.size
        networks = [
            {
                f"{i}.{'weight' if len(shape) > 1 else 'bias'}": (size * torch.randn(shape)).to(dtype)
                for i, shape in enumerate(tensors)
            }
            for tensors in self.shapes
        ]
        return encoder.to(dtype), networks


def results(encoder: sne_fast.SNE, networks: list[dict[str, Tensor]], backend: str) -> dict[str, Tensor]:
    """Return z and the gradients of the weights and of every parameter, by name."""
    encoder.zero_grad()
    leaves = [{name: t.clone().requires_grad_() for name, t in network.items()} for network in networks]
    with sne_fast.use_backend(backend):
        z = encoder(encoder.pack(leaves, dtype=next(encoder.parameters()).dtype))
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (z * direction.to(z.dtype)).sum().backward()
    found = {"z": z.detach()}
    for i, network in enumerate(leaves):
        found |= {f"weights.{i}.{name}": t.grad for name, t in network.items() if t.grad is not None}
    return found | {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def group_of(name: str) -> str:
    """Return what a result is judged together with: the attention block of a parameter, else its encoder."""
    block = re.match(r".*\.mab\d?(?=\.)", name)
    return block[0] if block else name.partition(".")[0]


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Return the error of every group; infinity where ``got`` is not finite and ``want`` is."""
    squares: dict[str, list[float]] = {}
    for name, exact in want.items():
        sums = squares.setdefault(group_of(name), [0.0, 0.0])
        sums[0] += float((got[name].double() - exact).square().sum())
        sums[1] += float(exact.square().sum())
    found = {}
    for group, (difference, size) in squares.items():
        error = math.sqrt(difference / max(size, TINY)) if math.isfinite(difference) else math.inf
        if math.isfinite(size):
            found[group] = error
    return found


def nudged(t: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``t`` with every number moved to one of its neighbours or left, at random."""
    step = torch.finfo(t.dtype).eps * torch.randint(-1, 2, t.shape, generator=generator, dtype=torch.float64)
    return (t.double() * (1 + step)).to(t.dtype)


def judge(configuration: Configuration, backend: str = "cpu") -> Json:
    """Compare ``backend`` with float64.

    Returns:
        The configuration; the errors of z and of the worst gradient; what eager PyTorch loses on the latter where it
        had to be asked, and in how many draws; by group the errors beyond what is allowed, over those of eager PyTorch.
    """
    encoder, networks = configuration.build()
    dtype = DTYPES[configuration.dtype]
    exact = copy.deepcopy(encoder).double()
    if dtype == torch.float64:  # nothing is more exact: the truth is rounded as finely as what is judged
        want = results(exact, networks, "reference")
    else:
        want = results(exact, [{name: t.double() for name, t in network.items()} for network in networks], "reference")
    want = {name: t.double() for name, t in want.items()}
    found = errors(results(encoder, networks, backend), want)
    of_z, of_gradients = BOUNDS[dtype]
    allowed = {name: of_z if name == "z" else of_gradients for name in found}
    beyond = [name for name, error in found.items() if not error <= allowed[name]]
    eager: dict[str, float] = dict.fromkeys(beyond, 0.0)
    generator, draws = torch.Generator().manual_seed(configuration.seed), 0
    while beyond and draws < DRAWS:
        if draws:
            there = copy.deepcopy(encoder)
            with torch.no_grad():
                for parameter in there.parameters():
                    parameter.copy_(nudged(parameter, generator))
            inputs = [{name: nudged(t, generator) for name, t in network.items()} for network in networks]
        else:
            there, inputs = encoder, networks
        lost = errors(results(there, inputs, "reference"), want)
        eager = {name: max(eager[name], lost[name]) for name in eager}
        beyond = [name for name in beyond if not found[name] <= 2 * eager[name]]
        draws += 1
    z, gradients = found.pop("z", 0.0), found
    worst = max(gradients, key=lambda name: gradients[name], default="")
    return {
        **asdict(configuration), "z": z, "gradients": gradients.get(worst, 0.0), "worst_gradient": worst,
        "eager": eager.get("z" if worst not in eager else worst, 0.0), "draws": draws,
        "beyond": {name: (found | {"z": z})[name] / max(eager[name], TINY) for name in beyond},
    }  # fmt: skip


def quantiles(numbers: list[float]) -> Json:
    """Return the distribution of errors."""
    if not numbers:
        return {}
    ordered = sorted(numbers)
    return {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in
            (("median", 0.5), ("0.9", 0.9), ("0.99", 0.99), ("0.999", 0.999), ("largest", 1.0))}  # fmt: skip


def summary(rows: list[Json]) -> Json:
    """Return the distribution of errors by dtype, within and beyond the bounds, and the worst configurations."""
    found: Json = {}
    for name, dtype in DTYPES.items():
        mine = [row for row in rows if row["dtype"] == name]
        plain = [row for row in mine if not row["draws"]]
        found[name] = {
            "configurations": len(mine), "bounds": BOUNDS[dtype], "within_bounds": len(plain),
            "ill_conditioned_within_twice_eager": len([row for row in mine if row["draws"] and not row["beyond"]]),
            "beyond": len([row for row in mine if row["beyond"]]),
            "z": quantiles([row["z"] for row in mine]), "gradients": quantiles([row["gradients"] for row in mine]),
            "z_within_bounds": quantiles([row["z"] for row in plain]),
            "gradients_within_bounds": quantiles([row["gradients"] for row in plain]),
        }  # fmt: skip
    return found


def _finished(file: Path | None, seeds: range) -> list[Json]:
    """Return what an earlier run has left in ``file`` about these seeds."""
    if file is None or not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["seed"] in seeds]


def _row(backend: str, seed: int) -> Json:
    return judge(Configuration.draw(seed), backend)


def main() -> int:
    """Parse the command line, judge, and write or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first configuration")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each of one thread")
    parser.add_argument("--rows", type=Path, help="keep each finished configuration here, and go on from it")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--show", action="store_true", help="print instead of writing")
    options = parser.parse_args()
    seeds, start = range(options.first, options.first + options.count), time.monotonic()
    rows = _finished(options.rows, seeds)
    done = {row["seed"] for row in rows}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        left = [seed for seed in seeds if seed not in done]
        for row in pool.map(functools.partial(_row, options.backend), left, chunksize=5):
            rows.append(row)
            if options.rows:
                with options.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if row["beyond"]:
                print(json.dumps(row), file=sys.stderr)
            if len(rows) % 100 == 0:
                print(f"{len(rows)} of {options.count}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    by_error = sorted(rows, key=lambda row: row["gradients"], reverse=True)
    state = revision()
    report = {
        "backend": options.backend, "instruction_set": library.isa(), "device": processor(), "versions": versions(),
        "commit": str(state) if state else None, "count": len(rows), "summary": summary(rows),
        "beyond": [row for row in rows if row["beyond"]],
        "worst_within_bounds": [row for row in by_error if not row["draws"]][:5],
        "worst_ill_conditioned": [row for row in by_error if row["draws"]][:5],
    }  # fmt: skip
    strict = json.loads(json.dumps(report), parse_constant=str)  # JSON has no infinity: results that overflow
    text = json.dumps(strict, indent=1, allow_nan=False) + "\n"
    print(json.dumps(report["summary"], indent=1))
    if not options.show:
        write_text(options.output, text)
    return 1 if report["beyond"] else 0


if __name__ == "__main__":
    sys.exit(main())
