"""Calibration: what views of one network do to z afterwards, and that nothing else changes."""

import copy
import math

import numpy as np
import pytest
import torch

import sne_fast
from sne_fast.similarity import nearest
from sne_fast.training import Views, calibrate


def networks(count):
    torch.manual_seed(0)
    found = []
    for i in range(count):
        net = torch.nn.Sequential(torch.nn.Linear(6, 5 + i % 3), torch.nn.ReLU(), torch.nn.Linear(5 + i % 3, 3))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + torch.rand(()) * p.abs()).add_(0.2 * torch.randn(()))
        found.append(net)
    return found


def made(chunks=False):
    torch.manual_seed(1)
    encoder = sne_fast.SNE(hidden_dim=32, statistics="relative", set_attention="isab", num_inducing=4, chunks=chunks)
    batch = encoder.pack(networks(40)).detach()
    encoder.set_statistics(batch)
    return encoder, batch


VIEWS = Views(noise=1, head=0.5)


def covariances(encoder, batch, count, seed):
    """Return the mean of z over networks and views, and its covariances within and between networks."""
    generator = torch.Generator().manual_seed(seed)
    rows = list(range(len(batch)))
    with torch.no_grad():
        z = torch.stack(
            [encoder(b).double() for b in (batch, *(VIEWS(batch, rows, generator) for _ in range(count)))], 1
        )
    within = sum((own - own.mean(0)).T @ (own - own.mean(0)) for own in z) / (len(batch) * count)
    centre = z.mean(1)
    return centre.mean(0), within, (centre - centre.mean(0)).T @ (centre - centre.mean(0)) / len(batch)


@pytest.mark.parametrize("chunks", [False, True])
def test_views_of_a_network_vary_by_one_at_most_and_networks_most_in_the_first_directions(chunks):
    encoder, batch = made(chunks)
    before = copy.deepcopy(encoder)
    calibrate(encoder, batch, VIEWS, count=8, seed=3)
    mean, within, between = covariances(encoder, batch, 8, 3)
    assert mean.abs().max() < 1e-2
    first, pooled = slice(0, 32), slice(32, 96)
    assert 1 <= torch.linalg.eigvalsh(between)[-1] < 4
    unit = 2.0 ** math.floor(math.log2(torch.linalg.eigvalsh(within[first, first])[-1].sqrt()) + 1e-3)
    within, between = within / unit**2, between / unit**2
    assert torch.linalg.eigvalsh(within[first, first])[-1] == pytest.approx(1, abs=1e-3)
    sizes = torch.linalg.eigvalsh(within[pooled, pooled])
    assert sizes[-1] <= 1.001 and within.diagonal()[pooled].min() > 0.5  # below 1 where views hardly differ
    spread = between.diagonal()[pooled]
    assert (spread.diff() <= 1e-3 * spread[:-1] + 1e-6).all()
    off = between[pooled, pooled] - spread.diag()
    assert off.abs().max() < 1e-3 * spread[0]
    changed = {name for name, p in encoder.state_dict().items() if not torch.equal(p, before.state_dict()[name])}
    norm = "network_encoder.pool.mab.ln1."
    assert changed == {
        "tensor_statistics.to_pool.weight",
        "tensor_statistics.to_pool.bias",
        f"{norm}weight",
        f"{norm}bias",
    }


def test_the_nearest_is_more_often_the_original():
    encoder, batch = made()
    queries = VIEWS(batch, range(len(batch)), torch.Generator().manual_seed(9))

    def found():
        with torch.no_grad():
            _, places = nearest(encoder(batch), encoder(queries), 1, metric="euclidean", whiten=False)
        return (places[:, 0] == np.arange(len(batch))).mean()

    before = found()
    calibrate(encoder, batch, VIEWS)
    assert found() > before + 0.1


def test_the_same_seed_gives_the_same_bits_and_twice_changes_little():
    encoder, batch = made()
    twin = copy.deepcopy(encoder)
    calibrate(encoder, batch, VIEWS, seed=5)
    calibrate(twin, batch, VIEWS, seed=5)
    with torch.no_grad():
        z = encoder(batch)
        assert torch.equal(z, twin(batch))
        calibrate(twin, batch, VIEWS, seed=5)
        again = twin(batch)
    torch.testing.assert_close(again, z, rtol=1e-2, atol=1e-2 * float(z.abs().max()))


def test_units_are_what_z_is_a_linear_map_of():
    encoder, batch = made()
    with torch.no_grad():
        found = encoder.tensor_statistics.to_pool(encoder.statistics_units(batch))
        torch.testing.assert_close(found, encoder(batch)[:, 32:])


def test_messages():
    encoder, batch = made()
    with pytest.raises(ValueError, match="statistics='relative' or 'tensor', and layer norms"):
        calibrate(sne_fast.SNE(hidden_dim=32), batch, VIEWS)
    with pytest.raises(ValueError, match="and layer norms"):
        calibrate(sne_fast.SNE(hidden_dim=32, statistics="tensor", layer_norm=False), batch, VIEWS)
    with pytest.raises(ValueError, match="at least 2 networks and 1 view of each, got 1 and 6"):
        calibrate(encoder, batch[:1], VIEWS)
    with pytest.raises(ValueError, match="got 40 and 0"):
        calibrate(encoder, batch, VIEWS, count=0)
    with pytest.raises(ValueError, match="views must change networks"):
        calibrate(encoder, batch, Views(noise=0, prune=0, round=0, head=0))
    with pytest.raises(ValueError, match="statistics_units needs statistics="):
        sne_fast.SNE(hidden_dim=32).statistics_units(batch)
