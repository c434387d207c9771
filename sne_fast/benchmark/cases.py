"""The benchmark's cases: one factory feeds the correctness check, the speed and the memory measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batch import WeightBatch
from ..nn.choices import SetAttention
from ..nn.encoder import SNE
from .networks import (
    BottleneckResNet,
    ResNet,
    Transformer,
    gpt2_state_dict,
    inr,
    randomise_,
    small_lenet,
    square_mlp,
    zoo_cnn,
)

SIZES = ("full", "check", "tiny")
"""full: as reported. check: the same architectures in at most 1e5 weights. tiny: the smallest, for tests."""
CHECK_WEIGHTS = 100_000
BLOCK = 1_000_000


@dataclass(frozen=True)
class Case:
    """Networks to encode, and how the benchmark runs them.

    `networks(size)` makes them for one of `SIZES`; `trains` is False where only the forward pass is measured; `rounds`
    caps the repetitions of cases that take minutes; `repeat` joins that many copies of the full-size batch.
    """

    name: str
    title: str
    networks: Callable[[str], Sequence[Any]]
    set_attention: SetAttention = "sab"
    trains: bool = True
    rounds: int | None = None
    repeat: int = 1

    def encoder(self) -> SNE:
        """Return an encoder of width 64, 4 heads, chunks of 32, layer norm, float32, with every parameter random."""
        encoder = SNE(hidden_dim=64, num_heads=4, chunk_size=32, layer_norm=True, set_attention=self.set_attention)
        randomise_(encoder, seed=1)
        return encoder

    def batch(self, encoder: SNE, size: str = "full") -> WeightBatch:
        """Pack the networks; no graph is kept to their weights."""
        if size not in SIZES:
            raise ValueError(f"Case.batch: size must be one of {', '.join(SIZES)}, got {size!r}")
        with torch.no_grad():
            packed = encoder.pack(self.networks(size))
        return WeightBatch.cat([packed] * self.repeat) if self.repeat > 1 and size == "full" else packed


def _many(make: Callable[..., nn.Module], count: int, *args: Any, first_seed: int = 0) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        return [randomise_(make(*args), seed=first_seed + n) for n in range(count)]


def _counts(make: Callable[..., nn.Module], full: int, check: int, tiny: int) -> Callable[[str], list[nn.Module]]:
    return lambda size: _many(make, dict(zip(SIZES, (full, check, tiny), strict=True))[size])


def _mixed(size: str) -> list[nn.Module]:
    inrs, cnns, lenets, transformers = {"full": (16, 16, 4, 2), "check": (4, 4, 1, 1), "tiny": (1, 1, 0, 1)}[size]
    shape = {"full": (64, 64, 4, 4, 32), "check": (64, 32, 4, 2, 16), "tiny": (8, 8, 2, 1, 4)}[size]
    return [
        *_many(inr, inrs, first_seed=100),
        *_many(zoo_cnn, cnns, first_seed=200),
        *_many(small_lenet, lenets, first_seed=300),
        *_many(Transformer, transformers, *shape, first_seed=400),
    ]


def _resnet(size: str) -> list[nn.Module]:
    widths = {"full": (64, 128, 256, 512), "check": (6, 12, 24, 44), "tiny": (4, 8)}[size]
    return _many(ResNet, 1, widths, 1 if size == "tiny" else 2)


def _resnet50(size: str) -> list[nn.Module]:
    shapes: dict[str, tuple[Any, ...]] = {
        "full": (),
        "check": ((4, 8, 12, 16), (1, 2, 1, 1), 10),
        "tiny": ((4,), (1,), 4),
    }
    return _many(BottleneckResNet, 1, *shapes[size])


def _gpt2(size: str) -> list[Any]:
    layers, width, vocabulary, length = {"full": (12, 768, 50257, 1024), "check": (2, 32, 1000, 64)}.get(
        size, (1, 16, 32, 8)
    )
    return [gpt2_state_dict(layers, width, vocabulary, length)]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("single", "one INR 1-32-32-1", _counts(inr, 1, 1, 1)),
        Case("inr", "256 INRs 1-32-32-1", _counts(inr, 256, 64, 2)),
        Case("zoo", "64 four-layer CNNs", _counts(zoo_cnn, 64, 20, 1)),
        Case("mixed", "16 INRs, 16 CNNs, 4 LeNets, 2 transformers", _mixed),
        Case("resnet", "one ResNet-18, ISAB", _resnet, "isab", rounds=2),
        Case("gpt2", "GPT-2, ISAB, forward only", _gpt2, "isab", trains=False, rounds=1),
    )
}

GPU_CASES: dict[str, Case] = {
    **CASES,
    "resnet50": Case("resnet50", "one ResNet-50, ISAB", _resnet50, "isab", rounds=3),
}
"""The cases of `bench/gpu_suite.py`."""

FAMILIES = ("networks", "network")
"""Families of scaling cases: more networks (zoo CNNs, SAB), or one larger network (three square matrices, ISAB)."""


def scaling_case(family: str, weights: int) -> Case:
    """Return a forward-only case of about `weights` weights."""
    if family not in FAMILIES:
        raise ValueError(f"scaling_case: family must be one of {', '.join(FAMILIES)}, got {family!r}")
    name = f"{family}@{weights}"
    if family == "network":

        def networks(size: str) -> list[nn.Module]:
            return _many(square_mlp, 1, weights if size == "full" else 3000)

        return Case(name, "one network of three square matrices", networks, "isab", trains=False)
    # Thousands of modules take long to make: a million weights of them are packed, then repeated.
    one = min(weights, BLOCK)
    count, repeat = max(1, round(one / 4970)), max(1, round(weights / one))
    return Case(name, f"{count * repeat} CNNs", _counts(zoo_cnn, count, 20, 1), trains=False, repeat=repeat)


def find_case(name: str) -> Case:
    """Return a case by its name: one of `GPU_CASES`, or "networks@1000000", "network@1000000" for scaling.

    Raises:
        ValueError: there is none of this name; the message lists those there are.
    """
    if name in GPU_CASES:
        return GPU_CASES[name]
    family, at, weights = name.partition("@")
    if at and family in FAMILIES and weights.isdigit() and int(weights):
        return scaling_case(family, int(weights))
    raise ValueError(f"no benchmark case {name!r}; there are {', '.join(GPU_CASES)} and networks@N, network@N")
