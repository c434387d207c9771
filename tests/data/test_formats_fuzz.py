"""Files of other formats with changed bytes: read, or refused with an error that names them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sne_fast import CheckpointError
from sne_fast.data.checkpoints import load_state_dict

WRITTEN = Path(__file__).parent / "formats"
# Not HDF5: its C library reads it.
LIBRARIES = {".onnx": "onnx", ".msgpack": "msgpack", ".npz": "numpy"}
FILES = ["onnx_dynamic.onnx", "onnx_qoperator.onnx", "onnx_nbits.onnx", "flax_model.msgpack", "tflite_variables.npz"]


@pytest.mark.fuzz
@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_are_read_or_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip(LIBRARIES[Path(name).suffix])
    data, numbers, file = (WRITTEN / name).read_bytes(), random.Random(0), tmp_path / name
    for _ in range(120):
        changed = bytearray(data)
        for _ in range(numbers.choice([1, 2, 8])):
            changed[numbers.randrange(8, len(changed))] = numbers.choice([0, 1, 127, 255, numbers.randrange(256)])
        if numbers.random() < 0.2:
            changed = changed[: numbers.randrange(9, len(changed))]
        file.write_bytes(changed)
        try:
            load_state_dict(file)
        except CheckpointError as error:
            assert str(file) in str(error)
