"""What the documentation shows passes a type checker, and what is wrong does not."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy")

pytestmark = pytest.mark.slow

RIGHT = """
from pathlib import Path
import torch
import sne_fast
from sne_fast.nn import Preparation
from sne_fast.zoo import Zoo, ZooNetwork

zoo: Zoo = Zoo.open("zoo")
network: ZooNetwork = zoo[0]
module = torch.nn.Linear(4, 3)
encoder = sne_fast.SNE(hidden_dim=32)
predictor = sne_fast.Predictor(encoder, preparation=Preparation(units="canonical"))
batch: sne_fast.WeightBatch = sne_fast.pack(zoo)
batch = sne_fast.pack([module, module.state_dict(), "a.pt", Path("b.pt"), network])
batch = sne_fast.pack(module)
batch = encoder.pack(zoo[:4])
batch = predictor.prepare(predictor.pack(zoo))
z: torch.Tensor = encoder(zoo)
z = encoder.forward(zoo)
z = predictor.forward(zoo)
z = predictor.encode(zoo[[1, 2]])
z = predictor.forward(batch)
z = predictor([module, network])
"""
WRONG = """
import sne_fast
encoder = sne_fast.SNE(hidden_dim=32)
sne_fast.pack(3)
encoder.forward([1, 2])
sne_fast.Predictor(encoder).encode(None)
sne_fast.nn.Preparation(units="sorted")
"""


def errors(code, tmp_path):
    file = tmp_path / "code.py"
    file.write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return [line for line in done.stdout.splitlines() if "error:" in line]


def test_networks_are_taken_as_the_documentation_shows(tmp_path):
    assert errors(RIGHT, tmp_path) == []


def test_what_is_no_network_is_an_error(tmp_path):
    assert [int(line.split(":")[1]) for line in errors(WRONG, tmp_path)] == [4, 5, 5, 6, 7]
