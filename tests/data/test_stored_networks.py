"""Networks packed by what is known of their architectures: the bits of packing them one by one, on odd cases too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sne_fast
from sne_fast.data import packing
from sne_fast.data.batch import WeightBatch
from sne_fast.data.batch_checks import POINTERS, TENSORS
from sne_fast.data.checkpoints import read_checkpoint, save_state_dict


def networks(seed: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv1d(4, 2, 5), torch.nn.Linear(9, 200)
    ).state_dict()
    odd = {
        "embed.weight": torch.randn(7, 5),
        "scalar": torch.tensor(2.0),
        "experts.weight": torch.randn(3, 4, 5),
        "zero.weight": torch.zeros(3, 3),
        "zero.bias": torch.randn(3),
        "empty.weight": torch.empty(0, 3),
        "position_ids": torch.arange(4),
    }
    mixed = {
        "fc.weight": torch.randn(33, 3).half(),
        "fc.bias": torch.randn(33).bfloat16(),
        "out.weight": torch.randn(2, 33).double(),
    }
    large = {"1.weight": torch.randn(150, 131), "0.weight": torch.randn(131, 3), "0.bias": torch.randn(131) * 1e-3}
    return [conv, odd, mixed, large]


def one_by_one(monkeypatch: pytest.MonkeyPatch, given: list, **options) -> WeightBatch:
    with monkeypatch.context() as patched:
        patched.setattr(packing, "stored_network", lambda *args: None)
        return sne_fast.pack(given, **options)


def check_same(one: WeightBatch, other: WeightBatch) -> None:
    for field in (*TENSORS, *(f"{field}_host" for field in POINTERS), "kernels", "chunk_positions"):
        first, second = getattr(one, field), getattr(other, field)
        assert first.dtype == second.dtype and torch.equal(first.nan_to_num(7), second.nan_to_num(7)), field
    for field in ("names", "shapes", "skipped", "chunk_size", "chunking", "scale", "order", "prepared"):
        assert getattr(one, field) == getattr(other, field), field


@pytest.mark.parametrize("chunking", ["flat", "neuron", "kernel"])
@pytest.mark.parametrize("scale", ["tensor", "none"])
def test_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunking: str, scale: str) -> None:
    given: list = []
    for seed in range(3):
        for i, tensors in enumerate(networks(seed)):
            save_file({n: t for n, t in tensors.items() if n != "empty.weight"}, tmp_path / f"{seed}_{i}.safetensors")
            save_state_dict(tensors, tmp_path / f"{seed}_{i}_ordered.safetensors")
            given += [tmp_path / f"{seed}_{i}.safetensors", str(tmp_path / f"{seed}_{i}_ordered.safetensors"), tensors]
        given += [torch.nn.Linear(3, 2).requires_grad_(False), read_checkpoint(tmp_path / f"{seed}_0.safetensors")]
    for options in (
        {"chunk_size": 32, "dtype": torch.float32},
        {"chunk_size": 1, "dtype": torch.bfloat16, "nonfinite": "keep"},
        {"chunk_size": 50, "dtype": torch.float64, "kinds": "names"},
    ):
        options = {**options, "chunking": chunking, "scale": scale}
        check_same(sne_fast.pack(given, **options), one_by_one(monkeypatch, given, **options))
    ordered = [network for network in given if "_ordered" in str(network) or isinstance(network, dict)]
    check_same(sne_fast.pack(ordered, order="definition"), one_by_one(monkeypatch, ordered, order="definition"))


def test_all_are_taken_by_their_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(networks(0)[0], tmp_path / "a.safetensors")

    def refuse(*args, **kwargs):
        raise AssertionError("packed one by one")

    monkeypatch.setattr(packing, "pack_collected", refuse)
    assert len(sne_fast.pack([tmp_path / "a.safetensors", networks(1)[0], networks(2)[3]])) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    tensors = networks(0)[0]
    tensors["3.weight"][3, 2] = value
    save_file(tensors, tmp_path / "a.safetensors")
    given = [networks(1)[0], tmp_path / "a.safetensors"]
    with pytest.raises(ValueError, match=r"network 1 .*a\.safetensors'\), tensor '3\.weight' has . NaN and . inf"):
        sne_fast.pack(given)
    for nonfinite in ("zero", "keep"):
        check_same(sne_fast.pack(given, nonfinite=nonfinite), one_by_one(monkeypatch, given, nonfinite=nonfinite))


def test_values_at_the_ends_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"beyond torch\.float32"):
        sne_fast.pack([networks(0)[0], {"fc.weight": torch.full((2, 2), 1e300, dtype=torch.float64)}])
    for value in (1e-200, 1e200):
        given = [{"fc.weight": torch.full((2, 2), value, dtype=torch.float64)}]
        check_same(sne_fast.pack(given, dtype=torch.float64), one_by_one(monkeypatch, given, dtype=torch.float64))


def test_what_depends_on_more_than_the_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = torch.randn(4, 4)
    quantised = {"fc.weight": torch.randint(-9, 9, (4, 4), dtype=torch.int8), "fc.weight_scale": torch.rand(4, 1)}
    cases = [
        {"a.weight": shared, "b.weight": shared},  # tied
        {"a.weight": shared.t(), "b.weight": shared.clone()},  # not contiguous
        {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)},
        quantised,
        {"fc.lora_A.weight": torch.randn(2, 8), "fc.lora_B.weight": torch.randn(8, 2)},
        {"fc.weight": torch.randn(3, 3, dtype=torch.complex64)},
        {"fc.weight": torch.randn(3, 3).to(torch.float8_e4m3fn)},
        {"fc.weight": torch.nn.Parameter(torch.randn(3, 3), requires_grad=False)},
        {"fc.weight": torch.randn(3, 3), "attn.bias": torch.ones(1, 1, 4, 4).tril()},  # known by its values
        {"fc.weight": torch.randn(3, 3), "attn.bias": torch.randn(1, 1, 4, 4)},
        {"fc.weight": torch.randn(3, 3), "step": 3},
    ]
    check_same(sne_fast.pack(cases), one_by_one(monkeypatch, cases))
    check_same(sne_fast.pack(cases[::-1]), one_by_one(monkeypatch, cases[::-1]))


def test_values_that_change_are_seen(tmp_path: Path) -> None:
    tensors = networks(0)[0]
    before = sne_fast.pack([tensors])
    tensors["3.bias"] *= 2
    after = sne_fast.pack([tensors])
    assert not torch.equal(before.tensor_scale, after.tensor_scale)
    file = tmp_path / "a.safetensors"
    for value in (1.0, 2.0):
        save_file({"fc.weight": torch.full((2, 2), value)}, file)
        assert sne_fast.pack(file).tensor_scale.item() == value


def test_gradients_reach_a_state_dict_that_requires_them() -> None:
    tensors = {"fc.weight": torch.randn(3, 3, requires_grad=True)}
    batch = sne_fast.pack([tensors, networks(0)[0]])
    batch.values[0].backward()
    assert tensors["fc.weight"].grad is not None
    with torch.no_grad():
        assert not sne_fast.pack([tensors]).values.requires_grad


def test_files_that_need_the_ordinary_reader(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"fc.weight": torch.randn(3, 3)}, file)
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-3], "its tensors take 36 bytes, it holds 33"),
        (whole[:5], "cannot tell|does not fit"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(sne_fast.CheckpointError, match=message):
            sne_fast.pack(file)
    with pytest.raises(sne_fast.CheckpointError, match=r"network 1: .*there is no such file"):
        sne_fast.pack([networks(0)[0], tmp_path / "no.safetensors"])
    save_file({"fc.weight": torch.randn(3, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(sne_fast.CheckpointError, match="is one of 2 parts"):
        sne_fast.pack(tmp_path / "model-00001-of-00002.safetensors")
