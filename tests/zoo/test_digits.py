"""The digits zoo: vectorised training equals a plain loop, and what is written is what was measured."""

import pytest
import torch
from torch import nn

from sne_fast.zoo import VerifyError, Zoo, ZooWriter, make_digits_zoo, verify
from sne_fast.zoo.architectures import ARCHITECTURES, FAMILIES
from sne_fast.zoo.classifiers import sample_recipe
from sne_fast.zoo.digits import ARCHITECTURES as NINE
from sne_fast.zoo.images import load_digits
from sne_fast.zoo.vmapped import Recipe, _subsets, train_together

pytest.importorskip("sklearn")


def recipe(**changes):
    k = len(next(iter(changes.values())))
    fields = {
        "steps": [5] * k,
        "lr": [0.1] * k,
        "momentum": [0.9] * k,
        "weight_decay": [1e-3] * k,
        "init_gain": [1.0] * k,
        "train_fraction": [1.0] * k,
        "label_noise": [0.0] * k,
    }
    return Recipe(**{name: torch.tensor(changes.get(name, value)) for name, value in fields.items()})


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory):
    return make_digits_zoo(tmp_path_factory.mktemp("zoo") / "z", networks=20, seed=3, max_steps=30)


PLANS = [(name, "sgd") for name in ARCHITECTURES if name != "vit"] + [("vit", "adam"), ("cnn3-pool-batchnorm", "adam")]


@pytest.mark.parametrize(("architecture", "optimiser"), PLANS)
def test_vectorised_training_equals_a_plain_loop(architecture, optimiser, digits):
    train, test = digits
    make, seed = ARCHITECTURES[architecture], 11
    # steps already descending, so the vectorised order is the given one
    plan = recipe(
        steps=[6, 4, 0],
        lr=[0.1, 0.02, 0.1] if optimiser == "sgd" else [3e-3, 1e-3, 1e-3],
        momentum=[0.9, 0.0, 0.5],
        init_gain=[1.0, 1.7, 0.6],
        train_fraction=[1.0, 0.1, 0.5],
        label_noise=[0.0, 0.5, 0.2],
    )
    got = train_together(make, plan, train, test, seed=seed, batch_size=32, optimiser=optimiser)

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = [make() for _ in range(3)]
    order, size, labels = _subsets(plan, train[1], 10, generator)
    for module, gain in zip(modules, plan.init_gain, strict=True):
        with torch.no_grad():
            for p in module.parameters():
                p *= gain if p.ndim > 1 else 1.0
    optimisers = []
    for module, row in ((modules[i], plan.row(i)) for i in range(3)):
        options = {"lr": row["lr"], "weight_decay": row["weight_decay"]}
        optimisers.append(
            torch.optim.SGD(module.parameters(), momentum=row["momentum"], **options)
            if optimiser == "sgd"
            else torch.optim.Adam(module.parameters(), betas=(row["momentum"], 0.999), **options)
        )
    for step in range(6):
        live = [i for i in range(3) if plan.steps[i] > step]
        pick = torch.rand(len(live), 32, generator=generator)
        for i in live:
            rows = order[i][(pick[i] * size[i]).long()]
            optimisers[i].zero_grad()
            nn.functional.cross_entropy(modules[i](train[0][rows]), labels[i][rows]).backward()
            nn.utils.clip_grad_norm_(modules[i].parameters(), 5.0)
            optimisers[i].step()
    for i, module in enumerate(modules):
        module.eval()
        mine = got.state_dict(i)
        assert list(mine) == list(module.state_dict())
        for name, value in module.state_dict().items():
            torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        with torch.no_grad():
            logits = module(test[0])
            seen = order[i, : size[i]]
            trained_on = module(train[0][seen])
        assert got.test_accuracy[i].item() == pytest.approx(
            (logits.argmax(1) == test[1]).float().mean().item(), abs=2e-3
        )
        assert got.test_loss[i].item() == pytest.approx(nn.functional.cross_entropy(logits, test[1]).item(), rel=1e-3)
        loss = nn.functional.cross_entropy(trained_on, labels[i][seen]).item()
        assert got.train_loss[i].item() == pytest.approx(loss, rel=1e-3)
        accuracy = (trained_on.argmax(1) == labels[i][seen]).float().mean().item()
        assert got.train_accuracy[i].item() == pytest.approx(accuracy, abs=5e-3)


def test_a_network_that_has_ended_keeps_its_bits(digits):
    train, test = digits
    make = ARCHITECTURES["cnn3-pool-batchnorm"]
    short = train_together(make, recipe(steps=[3, 3]), train, test, seed=0)
    long = train_together(make, recipe(steps=[9, 3]), train, test, seed=0)
    for name in short.order:
        assert torch.equal(short.state_dict(1)[name], long.state_dict(1)[name])
        assert not torch.equal(short.state_dict(0)[name], long.state_dict(0)[name])
    assert int(long.state_dict(0)["1.num_batches_tracked"]) == 9


def test_no_network_ends_as_nan(digits):
    train, test = digits
    wild = recipe(steps=[40, 40], lr=[1e4, 0.1], init_gain=[1e3, 1.0])
    got = train_together(ARCHITECTURES["cnn3-pool-batchnorm"], wild, train, test, seed=0)
    for i in range(2):
        assert all(v.isfinite().all() for v in got.state_dict(i).values())


def test_training_leaves_the_global_generator_alone(digits):
    before = torch.get_rng_state()
    train_together(ARCHITECTURES["mlp-10"], recipe(steps=[1]), *digits, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_recipe_and_optimiser_are_checked(digits):
    with pytest.raises(ValueError, match="optimiser must be 'sgd' or 'adam', got 'lion'"):
        train_together(ARCHITECTURES["mlp-10"], recipe(steps=[1]), *digits, seed=0, optimiser="lion")
    with pytest.raises(ValueError, match=r"same shape \(K,\)"):
        recipe(steps=[1, 2], lr=[0.1])


def test_accuracies_spread_from_chance_to_high(digits):
    plan = sample_recipe(24, seed=1)
    got = train_together(ARCHITECTURES["mlp-10"], plan, *digits, seed=1).test_accuracy
    assert got.min() < 0.25 and got.max() > 0.93
    assert got.std() > 0.2


def test_architectures_differ_and_are_small():
    sizes = {name: sum(p.numel() for p in make().parameters()) for name, make in ARCHITECTURES.items()}
    assert set(FAMILIES) == {"mlp", "cnn", "vit"} and len(sizes) >= 13
    assert all(600 <= size <= 5500 for size in sizes.values()), sizes
    assert sizes["unterthiner"] == 4970
    assert len(NINE) == 9 and all(sizes[name] <= 4000 for name in NINE)
    kinds = {type(m).__name__ for make in ARCHITECTURES.values() for m in make().modules()}
    assert {"Linear", "Conv2d", "LayerNorm", "GroupNorm", "BatchNorm2d", "AdaptiveAvgPool2d", "MaxPool2d"} <= kinds
    for make in ARCHITECTURES.values():
        assert make()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_reloaded_network_reproduces_its_accuracy(small_zoo):
    assert len(small_zoo) == 20
    assert verify(small_zoo) <= 1 / 600 + 1e-6  # one image may fall on the other side of a rounding
    assert set(small_zoo.column("architecture")) == set(NINE)
    assert small_zoo.targets == ["test_accuracy", "test_loss", "train_accuracy", "train_loss"]


def test_the_file_keeps_the_order_of_the_module(small_zoo):
    for i in range(len(small_zoo)):
        module = ARCHITECTURES[small_zoo.rows[i]["architecture"]]()
        assert list(small_zoo.state_dict(i)) == list(module.state_dict())


def test_same_seed_same_zoo(tmp_path, small_zoo):
    again = make_digits_zoo(tmp_path / "b", networks=20, seed=3, max_steps=30)
    assert again.rows == small_zoo.rows
    for i in range(20):
        for name, value in small_zoo.state_dict(i).items():
            assert torch.equal(value, again.state_dict(i)[name])
    other = make_digits_zoo(tmp_path / "c", networks=20, seed=4, max_steps=30)
    assert other.rows != small_zoo.rows


def rewritten(zoo, folder, change):
    """Make a copy of a zoo with the weights of its first network replaced."""
    with ZooWriter(folder, **{k: v for k, v in zoo.about.items() if k != "torch"}) as writer:
        for i, row in enumerate(zoo.rows):
            row.pop("weights")
            weights = zoo.state_dict(i)
            writer.add(row.pop("name"), change(weights) if i == 0 else weights, row)
    return Zoo.open(folder)


def test_verify_notices_other_weights(tmp_path):
    zoo = make_digits_zoo(tmp_path / "z", networks=2, architectures=["mlp-10", "cnn5-pool"], max_steps=300, seed=2)
    negative = rewritten(zoo, tmp_path / "n", lambda weights: {k: -v for k, v in weights.items()})
    assert verify(negative, [1]) <= 1 / 600 + 1e-6
    assert verify(negative) > 0.02
    with pytest.raises(VerifyError, match=r"mlp-10-000 differs by .* from the table, more than 0.01"):
        verify(negative, tolerance=0.01)
    with pytest.raises(ValueError, match="mlp-10-000 does not fit mlp-10"):
        verify(rewritten(zoo, tmp_path / "o", lambda _: ARCHITECTURES["mlp-10-10"]().state_dict()))
    unknown = Zoo({"name": ["a"]}, zoo.source, {"source": "mine"})
    with pytest.raises(ValueError, match="no way is known to rebuild networks of source 'mine'; give build="):
        verify(unknown)


def test_progress_rises_to_one(tmp_path):
    seen = []
    make_digits_zoo(
        tmp_path / "z", networks=2, architectures=["mlp-10", "mlp-10-10"], max_steps=5, on_progress=seen.append
    )
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_bad_arguments(tmp_path, small_zoo):
    with pytest.raises(ValueError, match="unknown architecture 'vgg'"):
        make_digits_zoo(tmp_path, architectures=["vgg"])
    with pytest.raises(ValueError, match="at least one per architecture"):
        make_digits_zoo(tmp_path, networks=3)
    with pytest.raises(ValueError, match="each named once"):
        make_digits_zoo(tmp_path, networks=3, architectures=["mlp-10", "mlp-10"])
    with pytest.raises(FileExistsError, match="holds a zoo already"):
        make_digits_zoo(small_zoo.folder, networks=20)
