"""The demo end to end on a tiny setting, its measures and its files."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import sne_fast
from sne_fast import Predictor
from sne_fast.atomic_files import write_json
from sne_fast.reports.files import write_csv
from sne_fast.reports.measures import measures, why_undefined
from sne_fast.tasks import demo
from sne_fast.tasks.baselines import Problem, Statistics
from sne_fast.tasks.demo import Demo, run
from sne_fast.tasks.requirements import check_extra
from sne_fast.tasks.run_folder import RunFolder
from sne_fast.zoo import Zoo, verify
from sne_fast.zoo.statistics import PLAIN, layer_statistics

TINY = Demo(seed=1, networks=36, max_steps=20).replace(hidden_dim=32, epochs=2)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    stream = io.StringIO()
    metrics = run(out, TINY, Console(file=stream, width=120))
    return out, metrics, stream.getvalue()


def test_writes_everything(result):
    out, metrics, _ = result
    assert sorted(p.name for p in out.iterdir()) == [
        "embedding.png",
        "metrics.json",
        "predictions.csv",
        "predictor",
        "scatter.png",
        "zoo",
    ]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for name in ("embedding.png", "scatter.png"):
        content = (out / name).read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) > 10_000
    assert len(Zoo.open(out / "zoo")) == 36
    assert verify(Zoo.open(out / "zoo"), [0, 20]) <= 1 / 600 + 1e-6


def test_reports_what_was_measured(result):
    _out, metrics, text = result
    parts = metrics["networks"]
    assert parts["train"] + parts["validation"] + parts["test"] == parts["all"] == 36
    models = metrics["held_out"]["models"]
    assert set(models) == {
        "SNE",
        "SNE and trees, mean",
        "layer statistics, boosted trees",
        "mean of the training networks",
    }
    mean = models["mean of the training networks"]
    assert mean["tau"] is None and mean["r2"] < 0.05
    assert sum(row["networks"] for row in metrics["held_out"]["sne_by_architecture"].values()) == parts["test"]
    assert len(metrics["train_loss"]) == len(metrics["validation_loss"]) == 2
    assert {"zoo", "packing", "training", "report", "all"} == set(metrics["seconds"])
    assert f"{models['SNE']['tau']:.3f}" in text and f"{models['SNE']['mae']:.3f}" in text
    assert "sne-fast predict --model" in text


def test_saved_predictor_gives_the_reported_predictions(result):
    out, metrics, _ = result
    predictor = Predictor.from_pretrained(out / "predictor")
    with open(out / "predictions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == metrics["networks"]["test"]
    opened = Zoo.open(out / "zoo")
    zoo = {network.name: (network.row, network) for network in opened}
    with torch.no_grad():
        values = predictor([zoo[row["name"]][1] for row in rows])[:, 0]
    torch.testing.assert_close(values, torch.tensor([float(r["predicted"]) for r in rows]), rtol=1e-3, atol=1e-4)
    files = [out / f"{i}.safetensors" for i in range(len(rows))]
    for file, row in zip(files, rows, strict=True):
        opened.export(opened.find(row["name"]), file)
    with torch.no_grad():
        assert torch.equal(predictor(files)[:, 0], values)
    for file in files:
        file.unlink()
    accuracy = np.array([float(r["accuracy"]) for r in rows])
    assert all(float(r["accuracy"]) == zoo[r["name"]][0]["test_accuracy"] for r in rows)
    again = measures(values.double().numpy(), accuracy)
    assert again["mae"] == pytest.approx(metrics["held_out"]["models"]["SNE"]["mae"], rel=1e-3)


def test_refuses_a_folder_with_something_in_it(result, tmp_path):
    out, _, _ = result
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        run(out, TINY)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        run(tmp_path / "file", TINY)


def test_an_interrupted_demo_resumes_to_the_same_bits(result, tmp_path, monkeypatch):
    whole, metrics, _ = result
    quiet = Console(file=io.StringIO())

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    for step, expected in (("make_digits_zoo", set()), ("predict", {"zoo", "fit.pt", "predictor"})):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(demo, step, interrupt)
            run(out, TINY, quiet)
        assert {path.name for path in out.iterdir()} == {"unfinished.json", *expected}
    with pytest.raises(
        ValueError, match=r"unfinished.json is of an unfinished run with other settings .*seed 1 then, 2"
    ):
        run(out, TINY.replace(seed=2), quiet)
    monkeypatch.setattr(demo, "make_digits_zoo", lambda *a, **k: pytest.fail("the zoo was made again"))
    again = run(out, TINY, quiet)
    assert again["held_out"] == metrics["held_out"] and again["train_loss"] == metrics["train_loss"]
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    file = "predictor/model.safetensors"
    assert (out / file).read_bytes() == (whole / file).read_bytes()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        run(out, TINY, quiet)


def test_two_demos_in_one_folder_exclude_each_other(tmp_path):
    with RunFolder(tmp_path).held("demo"), pytest.raises(BlockingIOError, match=r"is in use by process \d+ on"):
        run(tmp_path, TINY)


def test_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else object())
    with pytest.raises(ModuleNotFoundError, match=r'the demo needs scipy: pip install "sne_fast\[demo\]"$'):
        check_extra("the demo")


def test_measures_by_hand():
    true = np.array([0.1, 0.2, 0.3, 0.4])
    perfect = measures(true, true)
    assert perfect["tau"] == pytest.approx(1) and perfect["r2"] == 1 and perfect["mae"] == perfect["rmse"] == 0
    swapped = measures(np.array([0.2, 0.1, 0.3, 0.4]), true)
    assert swapped["tau"] == pytest.approx(4 / 6)  # one of six pairs is the wrong way round
    assert swapped["mae"] == pytest.approx(0.05) and swapped["rmse"] == pytest.approx((0.02 / 4) ** 0.5)
    assert swapped["r2"] == pytest.approx(1 - 0.02 / 0.05)
    for predicted, wanted, why in (
        (true, np.full(4, 0.5), "tau, tau_p, r2: all true values are equal"),
        (np.full(4, 0.5), true, "tau, tau_p: all predictions are equal"),
        (true[:1], true[:1], "tau, tau_p, r2: there is one network only"),
        (np.array([0.1, np.nan]), true[:2], "tau, tau_p, r2, mae, rmse: a prediction is not finite"),
        (true, true, None),
    ):
        assert why_undefined(predicted, wanted) == why
    constant = measures(np.full(4, 0.25), true)
    assert constant["tau"] is None and constant["tau_p"] is None and constant["r2"] == pytest.approx(0)


def test_layer_statistics_by_hand():
    weight, bias, last = torch.arange(6.0).view(2, 3), torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 2.0]])
    networks = [
        {"a.weight": weight, "a.bias": bias, "b.weight": last},
        {"a.weight": weight},
    ]
    for scale in ("tensor", "none"):
        rows = layer_statistics(sne_fast.pack(networks, chunk_size=4, scale=scale, dtype=torch.float64))
        assert rows.shape == (2, 35 * 4 + 21)
        table = rows[:, : 35 * 4].reshape(2, 4, 5, PLAIN)
        of_weight = [2.5, 35 / 12, 0, 1.25, 2.5, 3.75, 5]
        np.testing.assert_allclose(table[0, 0, 0], of_weight)
        np.testing.assert_allclose(table[0, 0, 1], [2, 1, 1, 1.5, 2, 2.5, 3])
        np.testing.assert_allclose(table[0, 1, 0], [2, 0, 2, 2, 2, 2, 2], atol=1e-12)
        np.testing.assert_allclose(table[0, 2], table[0, 1])  # last layer
        np.testing.assert_allclose(table[0, 3], table[0, 0])  # last but one
        np.testing.assert_allclose(table[1, 2], table[1, 0])
        assert np.isnan(table[1, 1]).all() and np.isnan(table[1, 3]).all() and np.isnan(table[0, :, 2:]).all()
        whole = rows[0, 35 * 4 :].reshape(3, PLAIN)
        np.testing.assert_allclose(whole[0], np.mean([of_weight, [2, 0, 2, 2, 2, 2, 2]], axis=0))
        np.testing.assert_allclose(whole[1], np.min([of_weight, [2, 0, 2, 2, 2, 2, 2]], axis=0), atol=1e-12)
        np.testing.assert_allclose(whole[2], np.max([of_weight, [2, 0, 2, 2, 2, 2, 2]], axis=0))


def test_the_baseline_learns_from_the_spread():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(120, generator=generator)
    networks = [{"w": (0.2 + t) * torch.randn(10, 10, generator=generator)} for t in target]
    problem = Problem(sne_fast.pack(networks), target.double().numpy(), range(80), [], logit=True)
    predicted = Statistics().fit_predict(problem)
    assert predicted.shape == (120,) and ((predicted > 0) & (predicted < 1)).all()
    assert measures(predicted[80:], target[80:].double().numpy())["r2"] > 0.6


def test_files_are_whole_or_not_there(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    with pytest.raises(csv.Error):
        write_csv(tmp_path / "a.csv", ["x"], [1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_quick_run_predicts_better_than_the_mean(tmp_path):
    metrics = run(tmp_path / "quick", Demo.quick(0), Console(file=io.StringIO()))
    models = metrics["held_out"]["models"]
    assert models["SNE"]["tau_p"] < 0.01
    assert models["SNE"]["rmse"] < models["mean of the training networks"]["rmse"]
