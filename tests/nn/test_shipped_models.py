"""Models that come with the package: their files, that they load without a network, and what their vectors are for."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from sne_fast import SNE
from sne_fast.nn.pretrained import SHIPPED, described, read_config, shipped_models
from sne_fast.similarity import nearest
from sne_fast.symmetry import chain_symmetry, permute

MOST = 2 * 2**20
"""Bytes that a shipped model may take in the wheel."""


@pytest.fixture(scope="module")
def encoder():
    return SNE.from_pretrained("sne-small")


def networks(count: int, seed: int = 0) -> list[nn.Module]:
    """Make networks of one architecture with weights of different distributions."""
    found = []
    for k in range(count):
        torch.manual_seed(1000 * seed + k)
        net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(float(torch.rand(()) + 0.5)).add_(0.1 * torch.randn(p.shape[:1] + (1,) * (p.ndim - 1)))
        found.append(net)
    return found


def test_shipped_models_are_small_and_say_where_they_come_from(encoder):
    assert shipped_models() == ["sne-small"]
    files = {path.name: path.stat().st_size for path in (SHIPPED / "sne-small").iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert sum(files.values()) <= MOST
    assert read_config("sne-small")["weights_sha256"] == described(encoder)["weights_sha256"]
    assert encoder.config["statistics"] == "relative" and not encoder.training


def test_it_loads_without_the_hub_and_a_folder_of_its_name_comes_first(monkeypatch, tmp_path, encoder):
    monkeypatch.setattr("sne_fast.nn.pretrained._hub", lambda why: pytest.fail(why))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time beside a folder of its name that holds no model
        assert SNE.from_pretrained("sne-small").config == encoder.config
        (tmp_path / "sne-small").mkdir(exist_ok=True)
    SNE(hidden_dim=32).save_pretrained("sne-small")
    assert SNE.from_pretrained("sne-small").config["hidden_dim"] == 32
    (tmp_path / "sne-small" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"folder 'sne-small' holds no config\.json"):
        SNE.from_pretrained("sne-small")
    with pytest.raises(FileNotFoundError, match="nor one of the package's models: sne-small"):
        SNE.from_pretrained(os.path.join("no", "such", "folder"))


def test_permuted_copies_with_a_new_head_are_found(encoder):
    gallery = networks(40)
    changed = []
    for k, net in enumerate(gallery):
        state = {name: t.detach().clone() for name, t in net.state_dict().items()}
        torch.manual_seed(k)
        fresh = nn.Linear(16, 3)
        state["4.weight"], state["4.bias"] = fresh.weight.detach(), fresh.bias.detach()
        changed.append(state)
    symmetry = chain_symmetry(gallery[0].state_dict())
    with torch.no_grad():
        z = encoder(gallery)
        batch = permute(encoder.pack(changed).detach(), symmetry, torch.Generator().manual_seed(0))
        _, places = nearest(z, encoder(batch), k=1)
    found = (places[:, 0] == np.arange(40)).mean()
    assert found >= 0.85  # of 40; by chance 0.025


def test_vectors_do_not_change_between_versions(encoder):
    with torch.no_grad():
        z = encoder(networks(2, seed=7))
    assert z.shape == (2, encoder.out_features)
    pinned = torch.tensor([[0.0625, -98.4992], [0.0592, -94.2881]]) / 128  # of both parts of z
    torch.testing.assert_close(z[:, [0, 64]], pinned, rtol=1e-3, atol=1e-3 / 128)
