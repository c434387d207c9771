"""Many networks by one call of `SNE.encode`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sne_fast
from sne_fast.data.layer_stream import LayerStream
from sne_fast.nn.many_networks import groups_of, packed_ahead


@pytest.fixture(scope="module")
def encoder() -> sne_fast.SNE:
    """Return a small encoder."""
    torch.manual_seed(0)
    return sne_fast.SNE(hidden_dim=16, num_heads=2, chunk_size=8, set_attention="isab").eval()


def state(seed: int, width: int = 5) -> dict[str, Tensor]:
    """Return the parameters of a small network."""
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(width, 4, generator=generator), "a.bias": torch.randn(width, generator=generator)}


def alone(encoder: sne_fast.SNE, sources: list[Any]) -> Tensor:
    """Return the vectors of networks that are encoded one by one."""
    return torch.stack([encoder.encode(source) for source in sources])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_weights", [1, 60, 10_000])
def test_vectors_and_their_order_are_those_of_networks_alone(
    encoder: sne_fast.SNE, tmp_path: Path, workers: int, batch_weights: int
) -> None:
    for i in range(3):
        save_file(state(i), tmp_path / f"{i}.safetensors")
    torch.save(state(3, 60), tmp_path / "large.pt")
    sources: list[Any] = [
        state(10), tmp_path / "0.safetensors", nn.Linear(3, 2), str(tmp_path / "large.pt"), tmp_path / "1.safetensors",
        LayerStream(state(11)), state(12, 70), state(13), tmp_path / "2.safetensors",
    ]  # fmt: skip
    shares: list[float] = []
    found = encoder.encode(
        sources, batch_weights=batch_weights, workers=workers, normalise=True, progress=shares.append
    )
    expected = alone(encoder, sources)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=2e-6)
    assert not found.requires_grad and shares == sorted(shares) and shares[-1] == 1.0


def test_a_generator_is_read_as_it_is_encoded(encoder: sne_fast.SNE) -> None:
    made: list[int] = []
    encoded_when_made: list[int] = []
    calls: list[int] = []
    exact = copy.deepcopy(encoder).double()  # networks together are rounded otherwise than alone
    handle = exact.network_encoder.register_forward_hook(lambda *_: calls.append(1))

    def networks() -> Iterator[dict[str, Tensor]]:
        for i in range(8):
            made.append(i)
            encoded_when_made.append(len(calls))
            yield state(i)

    shares: list[float] = []
    try:
        found = exact.encode(networks(), batch_weights=50, progress=shares.append)
    finally:
        handle.remove()
    torch.testing.assert_close(found, alone(exact, [state(i) for i in range(8)]), rtol=0, atol=2e-6)
    assert shares == [1.0] and encoded_when_made[-1] > 0, "the last network was made before the first was encoded"


def test_zoos_are_taken(encoder: sne_fast.SNE, tmp_path: Path) -> None:
    zoo = sne_fast.zoo.make_sine_zoo(tmp_path / "zoo", 3, steps=1)
    found = encoder.encode(zoo)
    assert found.shape == (3, 16)
    torch.testing.assert_close(found, encoder([dict(zoo.state_dict(i)) for i in range(3)]), rtol=0, atol=5e-6)


def test_networks_that_fail_are_rows_of_nan_or_end_the_call(encoder: sne_fast.SNE, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    sources: list[Any] = [
        state(0),
        tmp_path / "damaged.safetensors",
        state(1),
        {"a.weight": torch.full((2, 2), torch.nan)},
    ]
    with pytest.warns(
        UserWarning, match=r"2 of 4 networks failed \(network 1: .*damaged\.safetensors.*; network 3.*NaN"
    ):
        found = encoder.encode(sources, on_error="record")
    assert found.isnan().all(1).tolist() == [False, True, False, True]
    torch.testing.assert_close(found[[0, 2]], alone(encoder, [state(0), state(1)]), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=r"damaged\.safetensors"):
        encoder.encode(sources)
    with pytest.raises(ValueError, match="network 3"):
        encoder.encode([state(0), state(1), state(2), sources[3]])


def test_an_error_of_the_iterable_ends_the_call(encoder: sne_fast.SNE) -> None:
    def networks() -> Iterator[dict[str, Tensor]]:
        yield state(0)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        encoder.encode(networks(), on_error="record")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_weights": 0}, "batch_weights must be"),
        ({"workers": 0}, "workers must be"),
        ({"on_error": "skip"}, "on_error must be"),
        ({"normalise": 1}, "normalise must be"),
    ],
)
def test_bad_arguments_are_told(encoder: sne_fast.SNE, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"SNE.encode: {message}"):
        encoder.encode([state(0)], **options)


def test_groups_have_so_many_weights_at_most() -> None:
    sources = [state(i) for i in range(4)] + [state(4, 60)] + [state(5)] + ["https://a.org/b.safetensors"]
    groups = list(groups_of(sources, 50))
    assert [[place for place, _ in group] for group in groups] == [[0, 1], [2, 3], [4], [5], [6]]


def test_groups_are_packed_ahead_and_no_further() -> None:
    packed: list[int] = []

    def pack(group: int) -> int:
        packed.append(group)
        if group == 3:
            raise ValueError("three")
        return 10 * group

    found = packed_ahead(range(6), pack)
    assert next(found) == (0, 0) and len(packed) <= 2
    rest = dict(found)
    assert isinstance(rest.pop(3), ValueError) and rest == {1: 10, 2: 20, 4: 40, 5: 50}
