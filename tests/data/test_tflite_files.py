"""Weights of TFLite files: those that TensorFlow converted are the variables of the model, quantised ones nearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint

pytest.importorskip("tflite")

WRITTEN = Path(__file__).parent / "formats"


def wanted() -> dict[str, torch.Tensor]:
    """Return the variables of the model in the layout of torch."""
    stored = load_state_dict(WRITTEN / "tflite_variables.npz")
    held = {name.removeprefix("sequential."): tensor for name, tensor in stored.items()}
    kernel = held["deep.kernel"]
    return {
        "first.weight": held["first.kernel"].permute(3, 2, 0, 1),
        "first.bias": held["first.bias"],
        "deep.weight": kernel.permute(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2]),
        "deep.bias": held["deep.bias"],
        "up.weight": held["up.kernel"].permute(3, 2, 0, 1),
        "up.bias": held["up.bias"],
        "act.weight": held["act.alpha"].flatten(),
        "fc.weight": held["fc.kernel"].T,
        "fc.bias": held["fc.bias"],
    }


@pytest.mark.parametrize("file, error", [("model", 0.0), ("model_half", 1e-3), ("model_full", 0.02)])
def test_files_that_tensorflow_converted(file: str, error: float) -> None:
    found = read_checkpoint(WRITTEN / f"{file}.tflite")
    read = {name.removeprefix("sequential_1.").replace("_1", ""): t for name, t in found.tensors.items()}
    assert read.keys() == wanted().keys()
    for name, tensor in wanted().items():
        assert read[name].shape == tensor.shape
        torch.testing.assert_close(read[name].float(), tensor, rtol=0, atol=error * float(tensor.abs().max()))
    assert all("integers" in reason for reason in found.left_out.values()) and not found.keeps_order
    assert len(pack([found]).shapes[0]) == len(read)


@pytest.mark.parametrize("keep", [9, 40, 400, -1000])
def test_damaged_files_are_refused(tmp_path: Path, keep: int) -> None:
    (tmp_path / "n.tflite").write_bytes((WRITTEN / "model.tflite").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"n\.tflite: is damaged or no file of TFLite"):
        load_state_dict(tmp_path / "n.tflite")


def test_changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    data = (WRITTEN / "model_full.tflite").read_bytes()
    generator = torch.Generator().manual_seed(0)
    file = tmp_path / "n.tflite"
    for _ in range(300):
        changed = bytearray(data)
        for place in torch.randint(len(data), (4,), generator=generator).tolist():
            changed[place] = int(torch.randint(256, (), generator=generator))
        file.write_bytes(b"\x1c\0\0\0TFL3" + bytes(changed[8:]))
        try:
            load_state_dict(file)
        except CheckpointError as error:
            assert str(file) in str(error)
