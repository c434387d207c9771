"""A checkpoint of another training is refused, by what differs; more epochs of the same one continue it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_trainings import SETTINGS, goals, make, networks, packed, same
from sne_fast import Predictor
from sne_fast.nn import Preparation
from sne_fast.symmetry import CanonicalAugmentation, PermutationAugmentation, chain_symmetry
from sne_fast.training import FitSettings, fit
from sne_fast.training.digests import of_values
from sne_fast.training.fingerprint import differences, of_batch, of_object, of_training
from sne_fast.training.networks import PackedNetworks


def jitter(part: Any, rows: Any, generator: Any, size: float = 0.01) -> Any:
    noise = torch.randn(part.values.shape, generator=generator)
    return part.with_fields(values=part.values + size * noise)


def scaled(size: float) -> Callable[..., Any]:
    return lambda part, rows, generator: jitter(part, rows, generator, size)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Return the checkpoint of a training of `make()` on `goals()`."""
    fit(make(), packed(), goals(), SETTINGS, checkpoint=tmp_path / "fit.pt")
    return tmp_path / "fit.pt"


def refused(path: Path, message: str, predictor: Predictor | None = None, **changes: Any) -> None:
    predictor = predictor or make()
    call = {"batch": packed(predictor), "targets": goals(), "settings": SETTINGS, **changes}
    before, content = {k: t.clone() for k, t in predictor.state_dict().items()}, path.read_bytes()
    with pytest.raises(ValueError, match=f"fit.pt' is of another training: .*{message}"):
        fit(predictor, checkpoint=path, **call)
    assert path.read_bytes() == content
    assert all(torch.equal(before[k], t) for k, t in predictor.state_dict().items()), "the predictor is as it was"


def test_other_targets_are_refused(begun: Path) -> None:
    refused(begun, "targets differ; train with the same, or give another path", targets=1 - goals())
    closest = goals()
    closest[3, 0] = closest[3, 0].nextafter(torch.tensor(2.0))
    refused(begun, "targets differ", targets=closest)


def test_other_networks_are_refused(begun: Path) -> None:
    other = networks()
    other[4]["a.weight"] += 1e-3
    refused(begun, "networks differ; train", batch=make().encoder.pack(other))
    refused(begun, r"networks differ; train", batch=packed()[[1, 0, 2, 3, 4, 5]])
    refused(begun, r"networks differ \(6 networks of 210 weights then, 5 ", batch=packed()[:5], targets=goals()[:5])
    renamed = [{f"layer.{name}": tensor for name, tensor in network.items()} for network in networks()]
    found, expected = (make().encoder.pack(nets) for nets in (renamed, networks()))
    assert of_batch(found) == of_batch(expected), "names are for messages"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 32}, "encoder.chunk_size 16 then, 32 now"),
        ({"hidden": (8,)}, r"hidden_features \[16\] then, \[8\] now"),
        ({"loss": "bce"}, "loss 'mse' then, 'bce' now"),
        ({"target_transform": "logit"}, "target_transform 'identity' then, 'logit' now"),
        ({"target_names": ["large"]}, r"target_names \['target_0'\] then, \['large'\] now"),
        ({"encoder": {"num_heads": 2}}, "encoder.num_heads 4 then, 2 now"),
        ({"encoder": {"chunking": "neuron"}}, "encoder.chunking 'flat' then, 'neuron' now"),
        ({"encoder": {"scale": "none"}}, "encoder.scale 'tensor' then, 'none' now"),
        ({"encoder": {"scale": "none"}, "normalise_inputs": "zoo"}, "normalise_inputs False then, 'zoo' now"),
    ],
)
def test_another_predictor_is_refused(options: dict[str, Any], message: str, begun: Path) -> None:
    refused(begun, message, make(**options))


def test_frozen_parameters_are_another_training(begun: Path) -> None:
    predictor = make()
    predictor.encoder.requires_grad_(False)
    refused(begun, "frozen parameters differ", predictor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.1}, r"other settings \(lr 0.002 then, 0.1 now\)"),
        ({"seed": 1, "clip": 0.5}, r"other settings \(clip 1.0 then, 0.5 now; seed 0 then, 1 now\)"),
        ({"patience": 3}, r"other settings \(patience none then, 3 now\)"),
        ({"accumulate": 2}, r"other settings \(processes times accumulate 1 then, 2 now\)"),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], message: str, begun: Path) -> None:
    refused(begun, message, settings=FitSettings(epochs=2, **{"batch_weights": 80, **changes}))


def test_processes_and_accumulate_count_as_their_product() -> None:
    given = make(), PackedNetworks(packed(), goals())
    made = [of_training(*given, FitSettings(accumulate=a), processes=n) for a, n in ((6, 1), (2, 3), (3, 1))]
    assert made[0] == made[1] != made[2]


def test_other_validation_is_refused(tmp_path: Path, begun: Path) -> None:
    refused(begun, "validation networks differ .none then, 6 networks", validation=(packed(), goals()))
    path = tmp_path / "watched" / "fit.pt"
    fit(make(), packed(), goals(), SETTINGS, checkpoint=path, validation=(packed()[:3], goals()[:3]))
    refused(path, "validation targets differ", validation=(packed()[:3], goals()[3:]))
    refused(path, "validation networks differ", validation=(packed()[3:], goals()[:3]))


def test_other_augmentation_is_refused(tmp_path: Path, begun: Path) -> None:
    refused(begun, "augmentation differs .none then, jitter now", augment=jitter)
    symmetry = chain_symmetry(networks()[0])
    kinds = [
        jitter,
        functools.partial(jitter, size=0.02),
        functools.partial(jitter, size=0.03),
        scaled(0.1),
        scaled(0.2),
        PermutationAugmentation(symmetry),
        CanonicalAugmentation(symmetry),
        CanonicalAugmentation(symmetry, jitter=0.2),
        CanonicalAugmentation([symmetry] * 5),
        CanonicalAugmentation([chain_symmetry({"a.weight": torch.ones(9, 4), "b.weight": torch.ones(3, 9)})] * 5),
    ]
    assert len({repr(of_object(kind)) for kind in kinds}) == len(kinds)
    path = tmp_path / "changed" / "fit.pt"
    fit(make(), packed(), goals(), SETTINGS, augment=kinds[3], checkpoint=path)
    refused(path, "augmentation differs; train", augment=kinds[4])
    assert of_object(CanonicalAugmentation([chain_symmetry(networks()[0])] * 5)) == of_object(kinds[8])


def test_the_preparation_of_a_predictor_is_part_of_it(tmp_path: Path, begun: Path) -> None:
    refused(begun, "preparation.units 'given' then, 'canonical' now", make(preparation=Preparation(units="canonical")))
    path = tmp_path / "prepared" / "fit.pt"
    jittered = Preparation(units="canonical", jitter=0.1)
    fit(make(preparation=jittered), packed(), goals(), SETTINGS, checkpoint=path)
    for same_one in (jittered, Preparation(units="canonical", jitter=0.1)):  # one with caches, one without
        fit(make(preparation=same_one), packed(), goals(), SETTINGS, checkpoint=path)
    other = make(preparation=Preparation(units="canonical", jitter=0.2))
    refused(path, "augmentation differs; preparation.jitter 0.1 then, 0.2 now", other)


def test_an_augmentation_that_counts_its_calls_stays_the_same(tmp_path: Path) -> None:
    calls, count = [], 0

    def counting(part: Any, rows: Any, generator: Any) -> Any:
        nonlocal count
        count += 1
        calls.append(rows)
        return part

    for _ in range(2):
        fit(make(), packed(), goals(), SETTINGS, augment=counting, checkpoint=tmp_path / "fit.pt")
    assert count == len(calls) == 6, "the second call had nothing to do"


def test_more_epochs_continue_a_training(begun: Path, tmp_path: Path) -> None:
    longer = FitSettings(epochs=5, batch_weights=80)
    done: list[int] = []
    continued = make()
    history = fit(
        continued, packed(), goals(), longer, checkpoint=begun, on_epoch=lambda epoch, history: done.append(epoch)
    )
    assert done == [2, 3, 4] and len(history.train_loss) == 5
    # Interrupted and resumed, the continuation has the same bits.
    fit(make(), packed(), goals(), SETTINGS, checkpoint=tmp_path / "cut.pt")

    def stop(epoch: int, history: object) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make(), packed(), goals(), longer, checkpoint=tmp_path / "cut.pt", on_epoch=stop)
    again = make()
    assert fit(again, packed(), goals(), longer, checkpoint=tmp_path / "cut.pt").train_loss == history.train_loss
    assert same(again, continued)
    with pytest.raises(ValueError, match="has done 5 epochs, more than the 2 asked for"):
        fit(make(), packed(), goals(), SETTINGS, checkpoint=begun)


def test_another_start_of_the_same_training_resumes(begun: Path) -> None:
    torch.manual_seed(9)
    other = make()
    with torch.no_grad():
        other.head[0].weight.normal_()
    fit(other, packed(), goals().numpy(), SETTINGS, checkpoint=begun)
    whole = make()
    fit(whole, packed(), goals(), SETTINGS)
    assert same(other, whole)


def test_differences_are_named() -> None:
    then = {"targets": {"size": "4", "sha256": "ab"}, "predictor": {"loss": "mse", "old": 1}, "settings": {"lr": 1.0}}
    now = {"targets": {"size": "4", "sha256": "cd"}, "predictor": {"loss": "mse"}, "settings": {"lr": 2.0}}
    assert differences(then, now) == ["targets differ", "old 1 then, none now", "other settings (lr 1.0 then, 2.0 now)"]
    assert differences(then, then) == []


def test_digests_keep_values_apart() -> None:
    values = [
        None, True, 1, 1.0, "1", b"1", [1], (1, 1), [[1], []], {"a": 1}, {"b": 1}, torch.ones(1), torch.ones(1, 1),
        torch.ones(1).double(), torch.ones(1).numpy(), torch.tensor([0.0]), torch.tensor([-0.0]), {1, 2}, {1, 3}, len,
        max, float,
    ]  # fmt: skip
    assert len({of_values(value) for value in values}) == len(values)
    shared = [1, 2]
    assert of_values([shared, shared]) == of_values([[1, 2], [1, 2]])
    inside: list[Any] = []
    inside.append(inside)
    assert of_values(inside) == of_values(inside)


SIZES = {"noise": 0.01}


def reads_a_global(part: Any, rows: Any, generator: Any) -> Any:
    return jitter(part, rows, generator, SIZES["noise"])


class Noise:
    """An augmentation with a setting of any kind, which counts its calls in three ways."""

    factor = 1.0
    count = 0

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.calls = 0
        self.rows: list[Any] = []

    def __call__(self, part: Any, rows: Any, generator: Any) -> Any:
        self.calls += 1
        type(self).count += 1
        self.rows.append(rows)
        return jitter(part, rows, generator, 0.01 * self.factor)


class Slotted:
    __slots__ = ("size",)

    def __init__(self, size: float) -> None:
        self.size = size

    def __call__(self, part: Any, rows: Any, generator: Any) -> Any:
        return jitter(part, rows, generator, self.size)


def listed(size: float) -> Callable[..., Any]:
    sizes = [size]
    return lambda part, rows, generator: jitter(part, rows, generator, sizes[0])


@pytest.mark.parametrize(
    "make_augment",
    [
        lambda size: Noise([size]),
        lambda size: Noise({"of": {"weights": size}}),
        lambda size: Noise(Slotted(size)),
        lambda size: Noise(torch.nn.Dropout(size)),
        lambda size: functools.partial(Noise(None).__call__, generator={"size": size}),
        Slotted,
        listed,
    ],
)
def test_settings_of_an_augmentation_count_wherever_they_are_kept(make_augment: Any) -> None:
    assert of_object(make_augment(0.1)) == of_object(make_augment(0.1)) != of_object(make_augment(0.2))


def test_what_an_augmentation_reads_outside_itself_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of_object(reads_a_global), of_object(Noise(1))
    monkeypatch.setitem(SIZES, "noise", 0.02)
    monkeypatch.setattr(Noise, "factor", 2.0)
    after = of_object(reads_a_global), of_object(Noise(1))
    assert before[0] != after[0] and before[1] != after[1]
    monkeypatch.undo()
    assert before == (of_object(reads_a_global), of_object(Noise(1)))
    monkeypatch.setitem(globals(), "jitter", lambda part, rows, generator, size: part)
    assert before[0] != of_object(reads_a_global), "a function that it calls has changed"


def test_an_augmentation_that_changes_in_use_is_still_told_from_another(tmp_path: Path) -> None:
    path, augment = tmp_path / "fit.pt", Noise([0.1])
    fit(make(), packed(), goals(), SETTINGS, augment=augment, checkpoint=path)
    assert augment.calls == len(augment.rows) == 6
    fit(make(), packed(), goals(), SETTINGS, augment=augment, checkpoint=path)
    fit(make(), packed(), goals(), FitSettings(epochs=3, batch_weights=80), augment=Noise([0.1]), checkpoint=path)
    fit(make(), packed(), goals(), FitSettings(epochs=3, batch_weights=80), augment=augment, checkpoint=path)
    refused(path, "augmentation differs", augment=Noise([0.2]), settings=FitSettings(epochs=3, batch_weights=80))


def test_modules_that_were_replaced_are_another_training(begun: Path) -> None:
    predictor = make()
    predictor.head[1] = torch.nn.GELU()
    refused(begun, "modules differ", predictor)
    predictor = make()
    predictor.encoder.chunk_encoder.blocks[1].mab.ln0.eps = 1e-2
    refused(begun, "modules differ", predictor)


def test_the_loss_of_a_predictors_subclass_is_part_of_it(tmp_path: Path) -> None:
    class Robust(Predictor):
        def losses(self, outputs: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
            return (outputs - goals).abs().mean(1)

    def robust() -> Predictor:
        return Robust(make().encoder, hidden_features=(16,))

    fit(robust(), packed(), goals(), SETTINGS, checkpoint=tmp_path / "fit.pt")
    fit(robust(), packed(), goals(), SETTINGS, checkpoint=tmp_path / "fit.pt")
    Robust.losses = lambda self, outputs, goals: (outputs - goals).square().mean(1)  # type: ignore[method-assign]
    refused(tmp_path / "fit.pt", "modules differ", robust())
