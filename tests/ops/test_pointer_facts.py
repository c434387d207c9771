"""What is derived from lasting pointers once, and from others at every call."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import sne_fast
from sne_fast.ops import functional, pointer_facts
from sne_fast.ops.pointer_facts import declare_lasting, derived, empty_sets, lengths, owners, places


class Calls:
    def __init__(self, ptr: Tensor) -> None:
        self.ptr, self.made = ptr, 0

    def __call__(self) -> Tensor:
        self.made += 1
        return self.ptr.diff()


def test_lasting_tensors_keep_what_is_derived_and_others_do_not() -> None:
    calls = Calls(torch.tensor([0, 2, 5]))
    assert derived(calls.ptr, "diff", calls) is not derived(calls.ptr, "diff", calls)
    declare_lasting(calls.ptr)
    kept = derived(calls.ptr, "diff", calls)
    assert derived(calls.ptr, "diff", calls) is kept and calls.made == 3
    assert derived(calls.ptr, "another", calls) is not kept


def test_a_tensor_that_was_written_into_is_lasting_no_longer() -> None:
    calls = Calls(torch.tensor([0, 2, 5]))
    declare_lasting(calls.ptr)
    derived(calls.ptr, "diff", calls)
    calls.ptr[1] = 3
    assert derived(calls.ptr, "diff", calls).tolist() == [3, 2]


def test_facts_end_with_their_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    known = WeakTensorKeyDictionary()  # without tensors of other tests, which may end meanwhile
    monkeypatch.setattr(pointer_facts, "_facts", known)
    ptr = torch.tensor([0, 1])
    declare_lasting(ptr)
    lengths(ptr)
    assert len(known) == 1
    del ptr
    gc.collect()
    assert len(known) == 0


def test_what_was_derived_in_inference_mode_serves_training() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    ptr = torch.tensor([0, 1, 3])
    declare_lasting(ptr)
    with torch.inference_mode():
        owners(ptr, 3)
    assert not owners(ptr, 3).is_inference()
    x[owners(ptr, 3)].sum().backward()


def test_transforms_derive_anew() -> None:
    calls = Calls(torch.tensor([0, 2, 5]))
    declare_lasting(calls.ptr)
    torch.func.vmap(lambda x: x * derived(calls.ptr, "diff", calls))(torch.ones(3, 2))
    assert calls.made == 1
    derived(calls.ptr, "diff", calls)
    assert calls.made == 2


def test_tables_are_right() -> None:
    ptr = torch.tensor([0, 2, 2, 5])
    assert owners(ptr, 5).tolist() == [0, 0, 2, 2, 2]
    assert places(ptr, 5).tolist() == [0, 1, 0, 1, 2]
    assert lengths(ptr).tolist() == [2, 0, 3]
    found = empty_sets(ptr, ptr)
    assert found is not None and found.tolist() == [False, True, False]
    assert empty_sets(torch.tensor([0, 1]), torch.tensor([0, 1])) is None
    assert empty_sets(torch.tensor([0, 1]), None) is not None


def test_a_bad_pointer_stays_bad() -> None:
    ptr = torch.tensor([0, 2, 4])
    declare_lasting(ptr)
    x = torch.randn(5, 16)
    for _ in range(2):
        with pytest.raises(ValueError, match="ptr must start at 0"):
            functional.segment_pool(x, x[:, :2], ptr)


def test_batches_that_share_pointers_and_not_levels_have_their_own_codes() -> None:
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=2).double()
    batch = encoder.pack([nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))])
    first = encoder(batch)
    torch.testing.assert_close(encoder(batch), first, rtol=0, atol=0)
    deeper = batch.with_fields(layer_level=batch.layer_level + 5)
    assert float((encoder(deeper) - first).detach().abs().max()) > 1e-6
    torch.testing.assert_close(encoder.float()(batch.to(torch.float32)).double(), first, rtol=1e-3, atol=1e-3)
