"""The head, the predictor and its target statistics."""

import itertools

import numpy as np
import pytest
import torch

import sne_fast
from sne_fast import SNE, Predictor, PredictorHead


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return [
        torch.nn.Linear(4, 3),
        torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2)),
    ]


def make(**options):
    torch.manual_seed(1)
    return Predictor(SNE(hidden_dim=32), hidden_features=(16,), **options)


def test_head_is_the_papers_mlp():
    head = PredictorHead(8)
    shapes = [tuple(p.shape) for p in head.parameters()]
    assert shapes == [(512, 8), (512,), (512, 512), (512,), (1, 512), (1,)]
    kinds = [type(m).__name__ for m in head]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [type(m).__name__ for m in PredictorHead(8, 3, ())] == ["Linear"]


def test_head_refuses_empty_layers():
    with pytest.raises(ValueError, match="PredictorHead: out_features must be an integer of at least 1, got 0"):
        PredictorHead(8, 0)
    with pytest.raises(ValueError, match=r"hidden_features\[1\] must be an integer of at least 1, got 0"):
        PredictorHead(8, hidden_features=(16, 0))


def test_widths_and_names_may_be_any_ordered_iterable():
    names = np.array(["a", "b"])
    predictor = Predictor(SNE(hidden_dim=32), 2, np.array([16, 8]), target_names=names)
    assert predictor.hidden_features == (16, 8) and predictor.target_names == ("a", "b")
    assert Predictor(SNE(hidden_dim=32), np.int64(2), (n for n in (4,)), target_names=iter("ab")).hidden_features == (
        4,
    )
    for wrong in ({"a": 1, "b": 2}, {"a", "b"}, "ab", b"ab", 2, ["a", "a"], ["a", 1], itertools.repeat("a")):
        with pytest.raises(ValueError, match="target_names must"):
            Predictor(SNE(hidden_dim=32), 2, target_names=wrong)
    for wrong in ({16: 1}, {16}, 16, "16", itertools.repeat(16), [16.0], [True]):
        with pytest.raises(ValueError, match="hidden_features"):
            Predictor(SNE(hidden_dim=32), hidden_features=wrong)


def test_predicts_networks_and_batches_alike(networks):
    predictor = make(out_features=2, target_names=["a", "b"])
    batch = predictor.encoder.pack(networks)
    assert predictor(batch).shape == (2, 2)
    torch.testing.assert_close(predictor(networks), predictor(batch))
    torch.testing.assert_close(predictor(batch), predictor.head(predictor.encoder(batch)))  # mean 0, spread 1
    assert predictor(batch[0:0]).shape == (0, 2)


def test_targets_are_normalised_and_outputs_are_in_their_units(networks):
    predictor = make(out_features=2)
    targets = torch.tensor([[10.0, 1.0], [30.0, 1.0], [20.0, 1.0]])
    predictor.set_targets(targets)
    torch.testing.assert_close(predictor.target_mean, torch.tensor([20.0, 1.0]))
    torch.testing.assert_close(predictor.target_std, torch.tensor([(200 / 3) ** 0.5, 1.0]))  # constant: divided by 1
    normal = predictor.normalise(targets)
    torch.testing.assert_close(normal.mean(0), torch.zeros(2))
    torch.testing.assert_close(predictor.denormalise(normal), targets)
    raw = predictor.head(predictor.encoder(networks))
    torch.testing.assert_close(predictor(networks), raw * predictor.target_std + predictor.target_mean)


def test_logit_targets_stay_in_the_unit_interval(networks):
    predictor = make(target_transform="logit")
    targets = torch.tensor([[0.0], [0.5], [0.9], [1.0]])
    predictor.set_targets(targets)
    normal = predictor.normalise(targets)
    assert normal.isfinite().all()
    torch.testing.assert_close(predictor.denormalise(normal)[1:3], targets[1:3])
    assert ((predictor(networks) > 0) & (predictor(networks) < 1)).all()


def test_gradients_reach_every_parameter(networks):
    predictor = make()
    predictor(networks).sum().backward()
    missing = [name for name, p in predictor.named_parameters() if p.grad is None]
    assert missing == []


def test_buffers_are_saved():
    predictor = make()
    predictor.set_targets(torch.tensor([[1.0], [3.0]]))
    other = make()
    other.load_state_dict(predictor.state_dict())
    assert other.target_mean.item() == 2.0 and other.target_std.item() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_transform": "log"}, "target_transform must be one of"),
        ({"target_names": ["a", "b"]}, r"target_names must hold 1 name\(s\)"),
        ({"target_names": "a"}, r"target_names must hold 1 name\(s\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_targets():
    predictor = make(target_transform="logit")
    with pytest.raises(ValueError, match=r"must have shape \(n, 1\), got \(3,\)"):
        predictor.set_targets(torch.zeros(3))
    with pytest.raises(ValueError, match=r"must have shape \(n, 1\), got \(0, 1\)"):
        predictor.set_targets(torch.zeros(0, 1))
    with pytest.raises(ValueError, match="must be finite"):
        predictor.set_targets(torch.tensor([[0.5], [float("nan")]]))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 0.5 to 1.5"):
        predictor.set_targets(torch.tensor([[0.5], [1.5]]))


def test_a_batch_cut_otherwise_is_refused(networks):
    with pytest.raises(ValueError, match="chunk_size"):
        make()(sne_fast.pack(networks, chunk_size=8))


def zoo_like(scale, seed=0):
    """Make networks of two shapes; `scale` multiplies the first layer's matrix."""
    torch.manual_seed(seed)
    found = []
    for k in range(6):
        net = torch.nn.Sequential(torch.nn.Linear(4, 3 + k % 2), torch.nn.ReLU(), torch.nn.Linear(3 + k % 2, 2))
        with torch.no_grad():
            net[0].weight.mul_(scale)
        found.append(net)
    return found


def test_inputs_are_divided_by_what_their_like_measured():
    predictor = make_normalised()
    batch = predictor.encoder.pack(zoo_like(10.0)).detach()
    assert torch.equal(predictor.input_normaliser(batch).values, batch.values)
    predictor.set_inputs(batch)
    inside = predictor.input_normaliser(batch)
    sizes = (batch.chunk_ptr[batch.tensor_ptr]).diff().tolist()
    level = torch.repeat_interleave(batch.layer_level, batch.layer_ptr.diff())
    groups = {}
    for before, after, kind, depth in zip(
        batch.values.split(sizes), inside.values.split(sizes), batch.tensor_type.tolist(), level.tolist(), strict=True
    ):
        groups.setdefault((kind, depth), []).append((before, after))
    assert set(groups) == {(0, 0), (1, 0), (0, 1), (1, 1)}
    for pairs in groups.values():
        before, after = (torch.cat(part) for part in zip(*pairs, strict=True))
        torch.testing.assert_close(after, before / before.square().mean().sqrt())
    # A network ten times smaller in one tensor is told apart, which division by its own size hides.
    twice = predictor.input_normaliser(predictor.encoder.pack(zoo_like(1.0)).detach())
    torch.testing.assert_close(twice.values.split(sizes)[0], inside.values.split(sizes)[0] / 10)


def make_normalised():
    torch.manual_seed(1)
    return Predictor(SNE(hidden_dim=32, scale="none"), hidden_features=(16,), normalise_inputs=True)


def test_types_and_levels_that_training_did_not_have_take_the_mean():
    predictor = make_normalised()
    batch = predictor.encoder.pack(zoo_like(10.0)).detach()
    predictor.set_inputs(batch)
    divisor = predictor.input_normaliser.divisor
    sizes = (batch.chunk_ptr[batch.tensor_ptr]).diff()
    of_value = torch.repeat_interleave(batch.tensor_type, sizes)
    torch.testing.assert_close(divisor[0, 7], batch.values[of_value == 0].square().mean().sqrt())
    torch.testing.assert_close(divisor[9, 3], batch.values.square().mean().sqrt())
    deep = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(70)), torch.nn.BatchNorm1d(2))
    assert predictor([deep]).isfinite().all()


def test_input_divisors_are_saved_and_used_everywhere(tmp_path):
    predictor = make_normalised()
    batch = predictor.encoder.pack(zoo_like(10.0)).detach()
    predictor.set_inputs(batch)
    assert not torch.allclose(predictor(batch), predictor.denormalise(predictor.head(predictor.encoder(batch))))
    predictor.save_pretrained(tmp_path / "p")
    again = Predictor.from_pretrained(tmp_path / "p")
    assert torch.equal(again(batch), predictor(batch)) and torch.equal(again(zoo_like(10.0)), predictor(batch))
    empty = predictor(batch[0:0])
    assert empty.shape == (0, 1)


def test_gradients_reach_weights_through_the_divisors():
    predictor = make_normalised()
    nets = zoo_like(1.0)[:2]
    predictor.set_inputs(predictor.encoder.pack(nets))
    predictor(predictor.encoder.pack(nets)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for net in nets for p in net.parameters())


def test_an_encoder_that_divides_by_itself_is_refused():
    with pytest.raises(ValueError, match="normalise_inputs needs an encoder with scale='none', got 'tensor'"):
        make(normalise_inputs=True)


def test_fan_in_scale_makes_all_layers_start_alike():
    conv = torch.nn.Conv2d(3, 8, 5)
    nets = [
        torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8, 2)),
        torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 9, bias=False)),
    ]
    predictor = Predictor(SNE(hidden_dim=32, scale="none"), hidden_features=(16,), normalise_inputs="fan_in")
    batch = predictor.encoder.pack(nets).detach()
    predictor.set_inputs(batch)
    sizes = (batch.chunk_ptr[batch.tensor_ptr]).diff().tolist()
    before, after = (x.values.split(sizes) for x in (batch, predictor.input_normaliser(batch)))
    factors = [75**0.5] * 2 + [1.0] * 4 + [8**0.5] * 2 + [1.0, 2.0]
    assert len(factors) == len(before)
    for one, other, factor in zip(before, after, factors, strict=True):
        torch.testing.assert_close(other, one * factor)
    assert not predictor.state_dict().keys() & {"input_normaliser.scaled", "input_normaliser.divisor"}
    assert predictor(batch[0:0]).shape == (0, 1)


def test_fan_in_scale_is_saved(tmp_path):
    predictor = Predictor(SNE(hidden_dim=32, scale="none"), hidden_features=(16,), normalise_inputs="fan_in")
    predictor.save_pretrained(tmp_path / "p")
    again = Predictor.from_pretrained(tmp_path / "p")
    assert again.config == predictor.config and torch.equal(again(zoo_like(1.0)), predictor(zoo_like(1.0)))
    with pytest.raises(ValueError, match="normalise_inputs must be one of False, True, 'zoo', 'fan_in', got 'rms'"):
        Predictor(SNE(hidden_dim=32, scale="none"), normalise_inputs="rms")
