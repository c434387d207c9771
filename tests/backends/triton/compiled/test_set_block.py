"""set_block compiled for GPUs that are not here, with the sizes that the launch table gives there."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from helpers.triton_compiled import (
    ALL_ARCHITECTURES,
    ARCHITECTURES,
    KINDS,
    check_resources,
    compile_planned_block,
    spill_of_block,
)
from sne_fast.backends.triton import set_block_kernels as kernels
from sne_fast.backends.triton.set_block import Plan

pytestmark = pytest.mark.build

KERNELS = ("forward", "query_backward", "key_backward")
SINGLE, BRAIN = torch.float32, torch.bfloat16
compiled = functools.partial(compile_planned_block, Plan, kernels)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_forward_stays_in_registers_and_on_matrix_units(arch: int) -> None:
    check_resources(compiled("forward", arch), arch)


@pytest.mark.parametrize("h", [32, 64])
def test_tf32_and_float32_in_full_precision(h: int) -> None:
    check_resources(compiled("forward", 90, h, dtype=SINGLE, precision="high"), 90)
    check_resources(compiled("forward", 90, h, dtype=SINGLE), 90, matrix=False)


@pytest.mark.parametrize("kernel", ["query_backward", "key_backward"])
def test_the_backward(kernel: str) -> None:
    check_resources(compiled(kernel, 90), 90, 256)


EVERY = list(itertools.product(KERNELS, ((32, 4), (64, 4), (64, 8), (64, 1)), KINDS, ALL_ARCHITECTURES))


@pytest.mark.variants("kernel, sizes, kind, arch", [("forward", (32, 4), (BRAIN, "highest"), 90)], EVERY)
def test_all_variants_fit(kernel: str, sizes: tuple[int, int], kind, arch: int) -> None:
    on_matrix_units = kind != (SINGLE, "highest")
    for layer_norm in (True, False):
        result = compiled(kernel, arch, *sizes, *kind, layer_norm=layer_norm)
        check_resources(result, arch, spill_of_block(kernel, sizes[1], on_matrix_units), on_matrix_units)
