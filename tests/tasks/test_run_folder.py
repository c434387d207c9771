"""Results that runs of a task have left: read, or refused by the name of the file."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from sne_fast.regular_files import FileError
from sne_fast.tasks.definitions import Experiment
from sne_fast.tasks.run_folder import Run, RunFolder, read_array

RUN = Run(Experiment("one", {}, {}), "SNE", 0)
RESULT = {"method": "SNE", "seed": 0, "networks": {"train": 3}, "settings": None, "seconds": 1.0}


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path)
    made.write_result(RUN, RESULT, np.arange(3.0), np.ones((4, 2)))
    return made


def test_what_was_written_is_read(folder):
    assert folder.read_result(RUN) == RESULT and folder.results_of(RUN.experiment, "SNE") == [RESULT]
    assert read_array(folder.predicted(RUN), "predicted").tolist() == [0, 1, 2]
    assert read_array(folder.encodings(RUN), "encodings").tolist() == [[1, 1]] * 4
    assert folder.read_result(Run(RUN.experiment, "SNE", 1)) is None


@pytest.mark.parametrize(
    "content",
    [
        "", "[" * 5000, "[]", "{}", "{",
        *(json.dumps({k: v for k, v in RESULT.items() if k != missing}) for missing in ("seed", "networks")),
        json.dumps({**RESULT, "networks": [3]}), json.dumps({**RESULT, "networks": {"train": "3"}}),
    ],
)  # fmt: skip
def test_a_damaged_result_is_refused_by_name(folder, content):
    folder.result(RUN).write_text(content)
    for read in (lambda: folder.read_result(RUN), lambda: folder.results_of(RUN.experiment, "SNE")):
        with pytest.raises(FileError, match=r"one/sne-seed0\.json: "):
            read()


def test_damaged_arrays_are_refused_by_name(folder):
    file = folder.predicted(RUN)
    whole = file.read_bytes()
    np.savez(file, predicted=np.array([{}], dtype=object))
    pickled = file.read_bytes()
    for content in (b"", b"text", whole[:50], whole[:-30], whole.replace(b"NUMPY", b"NUMPX"), pickled):
        file.write_bytes(content)
        with pytest.raises(FileError, match=r"one/sne-seed0\.npz: is damaged or no \.npz file"):
            read_array(file, "predicted")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(FileError, match="is a named pipe"):
        read_array(file, "predicted")
