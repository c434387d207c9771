"""pool_block compiled for GPUs that are not here, with the sizes that the launch table gives there."""

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
from sne_fast.backends.triton import pool_block_kernels as kernels
from sne_fast.backends.triton.pool_block import Plan

pytestmark = pytest.mark.build

KERNELS = ("forward", "backward")
SINGLE, BRAIN = torch.float32, torch.bfloat16
compiled = functools.partial(compile_planned_block, Plan, kernels)


@pytest.mark.parametrize(("typical", "arch"), [(2, 90), *((20, arch) for arch in ARCHITECTURES)])
def test_the_forward_stays_in_registers_and_on_matrix_units(typical: int, arch: int) -> None:
    check_resources(compiled("forward", arch, typical=typical), arch)


@pytest.mark.parametrize("h", [32, 64])
def test_tf32_and_float32_in_full_precision(h: int) -> None:
    check_resources(compiled("forward", 90, h, dtype=SINGLE, precision="high"), 90)
    check_resources(compiled("forward", 90, h, dtype=SINGLE), 90, matrix=False)


def test_the_backward() -> None:
    check_resources(compiled("backward", 90), 90, 256)


EVERY = list(itertools.product(KERNELS, ((32, 4), (64, 4), (64, 8), (64, 1)), KINDS, ALL_ARCHITECTURES))


@pytest.mark.variants("kernel, sizes, kind, arch", [("forward", (32, 4), (BRAIN, "highest"), 90)], EVERY)
def test_all_variants_fit(kernel: str, sizes: tuple[int, int], kind, arch: int) -> None:
    on_matrix_units = kind != (SINGLE, "highest")
    for layer_norm in (True, False):
        result = compiled(kernel, arch, *sizes, *kind, layer_norm=layer_norm)
        check_resources(result, arch, spill_of_block(kernel, sizes[1], on_matrix_units), on_matrix_units)
