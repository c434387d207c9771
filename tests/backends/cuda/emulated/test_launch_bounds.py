"""Bounds of launches in place of lengths, in the emulator."""

from __future__ import annotations

import pytest
import torch

from helpers.launch_bounds import check_loose_bounds

pytestmark = pytest.mark.build


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_bounds_do_not_change_results(amp: torch.dtype | None) -> None:
    check_loose_bounds("cuda", amp)
