"""A check that bounds of launches change no result, for backends of GPUs."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

import sne_fast
from sne_fast import WeightBatch
from sne_fast.backends.gpu_plans import whole_blocks
from sne_fast.data.buckets import bucket_of, pad_to_bucket
from sne_fast.ops.launch_bounds import declare_bounds


def loose(batch: WeightBatch, longest: int) -> WeightBatch:
    """Return a padded batch whose bounds are much too large, that of the longest set as given."""
    for host, bounds in zip(batch.pointers_host.values(), bucket_of(batch).bounds, strict=True):
        counts = tuple(n + 8 if n else 0 for n in bounds.counts)
        declare_bounds(host, dataclasses.replace(bounds, longest=longest, typical=64, counts=counts))
    return batch


def check_loose_bounds(backend: str, amp: torch.dtype | None = None) -> None:
    """Compare a padded batch whose bounds are much too large with the same networks alone, on the reference.

    Under autocast in ``amp``, whose rounding the reference does not share, both run on the backend, and by whole
    blocks, since their parts round otherwise.
    """
    most, longest = (1e-3, 2048) if amp is None else (3e-2, whole_blocks.LONGEST)
    torch.manual_seed(0)
    model = sne_fast.SNE(hidden_dim=32, num_heads=1, chunk_size=32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        batch = model.pack([nn.Linear(8, 5)])
    found = []
    for name, one in (
        ("reference" if amp is None else backend, batch),
        (backend, loose(pad_to_bucket(batch), longest)),
    ):
        with sne_fast.use_backend(name):
            with torch.autocast("cpu", amp, enabled=amp is not None):
                z = model(one)[: len(batch)]
            found.append(
                (z.detach(), torch.autograd.grad(z.square().sum(), list(model.parameters()), allow_unused=True))
            )
    torch.testing.assert_close(found[1][0], found[0][0], rtol=most, atol=most / 10)
    for got, want in zip(found[1][1], found[0][1], strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=most, atol=most * float(want.abs().max()) + 1e-5)
