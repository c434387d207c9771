"""Checkpoints and a trained model for commands."""

import pytest
import torch

from sne_fast import SNE, Predictor
from sne_fast.data.checkpoints import save_state_dict


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"net{i}.safetensors")
        save_state_dict(
            torch.nn.Sequential(torch.nn.Linear(4, 3 + i), torch.nn.Linear(3 + i, 2)).state_dict(), paths[-1]
        )
    return paths


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(1)
    predictor = Predictor(SNE(hidden_dim=32, chunk_size=8), 2, (16,), target_names=["accuracy", "loss"])
    predictor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
