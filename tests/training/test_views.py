"""Views: each change of a packed batch is that of the state_dicts, leaves other networks alone, and is seeded."""

import pytest
import torch

import sne_fast
from sne_fast.symmetry import trace
from sne_fast.training.new_heads import with_new_heads
from sne_fast.training.views import Views, permuted, with_noise, with_pruning, with_rounding
from sne_fast.zoo.family_children import pruned, rounded, state_of


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))


def cnn():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 5)
    )


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return [mlp(), cnn(), mlp(), cnn(), torch.nn.Linear(4, 3)]


POINTERS = ("chunk_ptr", "tensor_ptr", "layer_ptr", "network_ptr", "tensor_type", "layer_level")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stored(batch):
    """Return the values as they were before packing divided them."""
    sizes = batch.chunk_ptr[batch.tensor_ptr].diff()
    return batch.values * batch.tensor_scale.repeat_interleave(sizes).to(batch.values)


@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("chunking", ["flat", "neuron", "kernel"])
def test_pruning_and_rounding_are_those_of_state_dicts(networks, scale, chunking):
    states = [state_of(net) for net in networks]
    batch = sne_fast.pack(states, scale=scale, chunking=chunking)
    shares = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.5], dtype=torch.float64)
    wanted = sne_fast.pack(
        [pruned(s, share) for s, share in zip(states, shares.tolist(), strict=True)], scale=scale, chunking=chunking
    )
    found = with_pruning(batch, shares)
    torch.testing.assert_close(found.values, wanted.values)
    torch.testing.assert_close(found.tensor_scale, wanted.tensor_scale)
    which = torch.tensor([True, False, False, True, False])
    wanted = sne_fast.pack(
        [rounded(s) if own else s for s, own in zip(states, which, strict=True)], scale=scale, chunking=chunking
    )
    found = with_rounding(batch, which)
    torch.testing.assert_close(stored(found), stored(wanted), atol=1e-6, rtol=1e-5)
    assert found.statistics is None


def test_noise_is_relative_to_its_tensor(networks):
    wide = [torch.nn.Linear(60, 60), torch.nn.Linear(60, 60)]
    with torch.no_grad():
        wide[1].weight.mul_(100)
    batch = sne_fast.pack(wide).detach()
    found = with_noise(batch, torch.tensor([0.2, 0.2], dtype=torch.float64), generator())
    change = (stored(found) - stored(batch)).split([3600, 60, 3600, 60])
    for k in (0, 2):
        assert change[k].square().mean().sqrt() == pytest.approx(0.2 * float(batch.tensor_scale[k]), rel=0.1)
    squares = found.values.square().split([3600, 60, 3600, 60])
    assert all(abs(float(part.mean()) - 1) < 1e-5 for part in squares)  # divided by its root mean square again
    one = with_noise(batch, torch.tensor([0.2, 0.0], dtype=torch.float64), generator())
    torch.testing.assert_close(one[1].values, batch[1].values)
    assert with_noise(batch, torch.zeros(2), generator()) is batch


def test_permuted_networks_compute_the_same(networks):
    batch = sne_fast.pack(networks).detach()
    own = {mlp: trace(networks[0], torch.zeros(2, 20)), cnn: trace(networks[1], torch.randn(2, 1, 5, 5))}
    symmetries = [own[mlp], own[cnn], own[mlp], own[cnn], None]
    which = torch.tensor([True, True, False, True, True])
    found = permuted(batch, symmetries, which, generator())
    assert [torch.equal(found[b].values, batch[b].values) for b in range(5)] == [False, False, True, False, True]
    assert torch.equal(found.chunk_ptr, batch.chunk_ptr) and found.names == batch.names
    torch.testing.assert_close(found[0].values.sort().values, batch[0].values.sort().values)


@pytest.mark.parametrize("chunking", ["flat", "neuron", "kernel"])
def test_new_heads_are_packed_as_networks_with_them_are(networks, chunking):
    batch = sne_fast.pack(networks, chunking=chunking).detach()
    which = torch.tensor([True, True, False, True, True])
    found = with_new_heads(batch, which, torch.tensor([True, False, True, True, True]), generator(3))
    outputs = [shapes[-1][0] for shapes in found.shapes]
    assert outputs[1:3] == [5, 5] and 2 <= outputs[0] <= 10 and outputs[0] != 5 != outputs[3]
    assert outputs[4] == 3 and torch.equal(found[4].values, batch[4].values)  # of a single layer
    changed = [mlp(), cnn(), mlp(), cnn(), torch.nn.Linear(4, 3)]
    changed[0][2] = torch.nn.Linear(16, outputs[0])
    changed[3][4] = torch.nn.Linear(72, outputs[3])
    wanted = sne_fast.pack(changed, chunking=chunking)
    for field in POINTERS:
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field
    assert found.shapes == wanted.shapes and found.names == batch.names
    assert torch.equal(found.kernels, wanted.kernels)
    body = int(batch.chunk_ptr[batch.tensor_ptr[2]])
    assert torch.equal(found.values[:body], batch.values[:body])  # all but the head of the first network
    head = stored(found[0])[body:]
    assert 0.4 < head.square().mean().sqrt() * (3 * 16) ** 0.5 < 2.6
    encoder = sne_fast.SNE(hidden_dim=32, chunking=chunking, statistics="relative")
    assert encoder(found).isfinite().all()


def test_views_are_seeded_and_each_can_be_switched_off(networks):
    batch = sne_fast.pack(networks).detach()
    symmetries = [trace(networks[0], torch.zeros(2, 20)), None, None, None, None]
    off = {"permute": 0, "noise": 0, "prune": 0, "round": 0, "head": 0}
    assert Views(symmetries, **off)(batch, range(5), generator()) is batch
    for name in off:
        views = Views(symmetries, **{**off, name: 1})
        one, same, other = (views(batch, range(5), generator(seed)) for seed in (0, 0, 1))
        assert torch.equal(one.values, same.values) and one.shapes == same.shapes
        assert one.values.shape != batch.values.shape or not torch.equal(one.values, batch.values), name
        if name != "round":
            assert one.values.shape != other.values.shape or not torch.equal(one.values, other.values), name
    every = Views(symmetries)(batch[[3, 0]], [3, 0], generator())
    assert len(every) == 2
    with pytest.raises(ValueError, match=r"noise must be a share in \[0, 1\], got 2"):
        Views(noise=2)
    for size in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"noise_size must be finite and at least 0, got {size}"):
            Views(noise_size=size)
