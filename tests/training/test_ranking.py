"""The ranking loss: its formula, and what training with it changes."""

import math

import pytest
import torch
from torch import nn

import sne_fast
from sne_fast.training import FitSettings, fit
from sne_fast.training.ranking import ranking_losses


def by_loops(outputs, goals):
    total, pairs = 0.0, 0
    for k in range(goals.shape[1]):
        for i in range(len(goals)):
            for j in range(len(goals)):
                if i == j:
                    continue
                pairs += 1
                d, e = (goals[i, k] - goals[j, k]).item(), (outputs[i, k] - outputs[j, k]).item()
                sign = math.copysign(1, d) if d else 0.0
                total += min(1.0, abs(d) / 0.5) * math.log1p(math.exp(-4 * sign * e))
    return total / pairs


@pytest.mark.parametrize(("networks", "targets"), [(2, 1), (5, 1), (7, 3)])
def test_it_is_the_mean_over_pairs(networks, targets):
    generator = torch.Generator().manual_seed(networks)
    outputs = torch.randn(networks, targets, generator=generator, dtype=torch.float64, requires_grad=True)
    goals = torch.randn(networks, targets, generator=generator, dtype=torch.float64)
    goals[1] = goals[0]  # a tie, which costs nothing
    losses = ranking_losses(outputs, goals)
    assert losses.mean().item() == pytest.approx(by_loops(outputs, goals), rel=1e-12)
    assert torch.autograd.gradcheck(lambda o: ranking_losses(o, goals), outputs)
    padded = [torch.cat([of, torch.full((3, targets), 9.0)]) for of in (outputs, goals)]
    found = ranking_losses(*padded, real=torch.arange(networks + 3) < networks)
    torch.testing.assert_close(found, torch.cat([losses, losses.new_zeros(3)]))


def test_one_network_has_no_pairs_and_far_outputs_stay_finite():
    outputs = torch.tensor([[1e6], [-1e6]], requires_grad=True)
    assert ranking_losses(outputs[:1], torch.zeros(1, 1)).tolist() == [0]
    loss = ranking_losses(outputs, torch.tensor([[-1.0], [1.0]])).mean()
    loss.backward()
    assert loss.item() == pytest.approx(8e6) and outputs.grad.isfinite().all()


def trained(ranking, loss="mse"):
    torch.manual_seed(0)
    networks = [nn.Linear(3, 4) for _ in range(24)]
    labels = torch.tensor([float(n.weight.square().mean()) for n in networks])
    names = ["size"] if loss == "mse" else ["small", "large"]
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32, num_heads=4, chunks=False, statistics="tensor"),
                                   out_features=len(names), target_names=names, loss=loss)  # fmt: skip
    targets = labels[:, None] if loss == "mse" else (labels > labels.median()).long()
    batch = predictor.pack(networks).detach()
    history = fit(predictor, batch, targets, FitSettings(epochs=6, lr=3e-3, batch_weights=200, ranking=ranking))
    with torch.no_grad():
        return predictor, predictor(batch), targets, history


def test_training_ranks_better_and_reports_the_plain_loss():
    _, plain, targets, _ = trained(0.0)
    predictor, ranked, _, history = trained(20.0)
    right = [((out - out.T).sign() == (targets - targets.T).sign()).float().mean() for out in (plain, ranked)]
    assert right[1] > right[0], right
    goals = predictor.normalise(targets)
    assert history.train_loss[0] < 4 * goals.square().mean(), "the history holds the squared error alone"


def test_classes_are_trained_without():
    (_, plain, _, _), (_, ranked, _, _) = trained(0.0, "cross_entropy"), trained(20.0, "cross_entropy")
    assert torch.equal(plain, ranked)
