"""The head, the predictor and its target statistics."""

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
    with pytest.raises(ValueError, match="every width must be at least 1"):
        PredictorHead(8, 0)
    with pytest.raises(ValueError, match="every width must be at least 1"):
        PredictorHead(8, hidden_features=(16, 0))


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
