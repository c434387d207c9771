"""`sne-fast train`: a zoo to a predictor, with splits, classes, permutations, resume and several processes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sne_fast
from helpers.paths import ELSEWHERE, environment_of_tests
from sne_fast.cli.commands import app
from sne_fast.tasks.run_folder import RunFolder
from sne_fast.training.recipes import RECIPES, find_recipe
from sne_fast.zoo import Zoo, make_sine_zoo

# gloo looks the machine's own name up, which a closed-off one may not know.
LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"
SMALL = ["--epochs", "3", "--batch-weights", "12000"]
PLAIN = ["--recipe", "paper", "--hidden-dim", "32", *SMALL]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sine INRs, a column of classes and one of parts."""
    folder = tmp_path_factory.mktemp("zoo")
    made = make_sine_zoo(folder / "plain", 30, seed=0)
    a = made.column("a")
    split = ["train" if i % 5 < 3 else ("validation" if i % 5 == 3 else "test") for i in range(30)]
    made = made.with_column("kind", ["slow" if value < 5 else "fast" for value in a]).with_column("part", split)
    made.with_column("share", (a / 10.5).tolist()).save(folder / "zoo")
    return folder / "zoo"


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_trains_evaluates_and_writes_everything(zoo: Path, tmp_path: Path) -> None:
    output = run(
        zoo,
        "-o",
        tmp_path / "run",
        "--target",
        "a",
        "--target",
        "mse",
        "--split",
        "part",
        "--units",
        "permuted",
        *SMALL,
    )
    assert "epoch 3/3" in output and "tau" in output
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["networks"] == {"train": 18, "validation": 6, "test": 6} and set(found["test"]) == {"a", "mse"}
    predictor = sne_fast.Predictor.from_pretrained(tmp_path / "run" / "predictor")
    assert predictor.target_names == ("a", "mse") and predictor.encoder.hidden_dim == 32
    with open(tmp_path / "run" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    held = Zoo.open(zoo)
    test = held[held.column("part") == "test"]
    assert [row["name"] for row in rows] == test.column("name").tolist()
    values = predictor(test)
    assert [float(row["predicted a"]) for row in rows] == pytest.approx(values[:, 0].tolist(), rel=1e-4)
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 4
    assert {"scatter.png", "learning-curve.png", "recipe.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    trees = found["baselines"]["layer statistics, boosted trees"]
    assert set(trees) == {"a", "mse"} and "a, layer statistics, boosted trees" in output


def test_the_same_command_resumes_and_another_is_refused(zoo: Path, tmp_path: Path) -> None:
    command = [zoo, "-o", tmp_path, "--target", "a", *SMALL]
    run(*command)
    before = load_file(tmp_path / "predictor" / "model.safetensors")
    assert "epoch" not in run(*command).split("tau")[0]  # nothing is left to do
    after = load_file(tmp_path / "predictor" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    result = CliRunner().invoke(app, ["train", *map(str, command), "--lr", "0.1"])
    assert result.exit_code == 2 and "other settings (lr 0.001 then, 0.1 now)" in result.output


def refused(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_a_folder_of_another_training_is_refused_and_kept(zoo: Path, tmp_path: Path) -> None:
    opened = Zoo.open(zoo)
    opened.with_column("a", [value + (i == 3) for i, value in enumerate(opened.column("a"))]).save(tmp_path / "other")
    command = [zoo, "-o", tmp_path / "run", "--target", "a", *PLAIN]
    run(*command)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    for changes, message in (
        (["--target", "mse"], r"targets differ \(24x1 numbers then, 24x2 numbers now\)"),
        (["--transform", "logit", "--target", "share"], "target_transform 'identity' then, 'logit' now"),
        (["--chunk-size", "16"], "encoder.chunk_size 32 then, 16 now"),
        (["--chunking", "neuron"], "encoder.chunking 'flat' then, 'neuron' now"),
        (["--input-scale", "zoo"], "encoder.scale 'tensor' then, 'none' now; .*normalise_inputs False then, 'zoo' now"),
        (["--num-heads", "2"], "encoder.num_heads 4 then, 2 now"),
        (["--code-gain", "1"], "code gain 0.1 then, 1.0 now"),
        (["--units", "permuted"], "augmentation differs .none then, PermutationAugmentation now"),
        (["--statistics", "tensor"], "encoder.statistics 'none' then, 'tensor' now"),
        (["--split", "part"], "networks differ .24 networks .* then, 18 networks"),
        (["--seed", "1"], "networks differ; .*other settings .seed 0 then, 1 now"),
        (["--batch-weights", "6000"], "other settings .batch_weights 12000 then, 6000 now"),
    ):
        chosen = [part for part in command if part not in ("--target", "a")] if "logit" in changes else command
        assert re.search(f"of another training: .*{message}", refused(*chosen, *changes)), changes
    single = [part if part != "a" else "mse" for part in command]
    assert re.search(r"another training: targets differ; .*target_names \['a'\] then, \['mse'\] now", refused(*single))
    assert "targets differ; train with the same" in refused(tmp_path / "other", *command[1:])
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    run(*command, "--code-gain", "0.1")  # the default is no change


@pytest.mark.parametrize("name", ["predictor", "metrics.json", "predictions.csv", "log.csv"])
def test_what_stands_in_the_place_of_an_output_is_named_before_any_epoch(name: str, zoo: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("") if name == "predictor" else (tmp_path / name).mkdir()
    output = refused(zoo, "-o", tmp_path, "--target", "a", *SMALL)
    assert re.search(rf"train: '\S*{name}' is no (folder|regular file)", output) and "epoch" not in output
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_more_epochs_continue_a_training(zoo: Path, tmp_path: Path) -> None:
    command = [zoo, "-o", tmp_path, "--target", "a", *SMALL]
    run(*command)
    output = run(*command, "--epochs", "5")
    assert "epoch 4/5" in output and "epoch 5/5" in output and "epoch 3/5" not in output
    assert [int(row.split(",")[0]) for row in (tmp_path / "log.csv").read_text().split()[1:]] == list(range(5))


def test_a_folder_that_another_process_trains_into_is_refused(zoo: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path).held("train"):
        message = refused(zoo, "-o", tmp_path, "--target", "a", *SMALL)
    assert f"is in use by process {os.getpid()} on" in message and "choose another --out" in message
    assert list(tmp_path.iterdir()) == []


def test_a_constant_target_has_measures_that_say_why_they_are_none(zoo: Path, tmp_path: Path) -> None:
    opened = Zoo.open(zoo)
    opened.with_column("constant", [0.5] * len(opened)).save(tmp_path / "zoo")
    output = run(tmp_path / "zoo", "-o", tmp_path / "run", "--target", "constant", *SMALL)
    content = (tmp_path / "run" / "metrics.json").read_text()
    test = json.loads(content, parse_constant=lambda text: pytest.fail(text))["test"]["constant"]
    assert test["r2"] is None and test["tau"] is None and test["mae"] >= 0 and "\t-\t" in output
    assert test["undefined"] == "tau, tau_p, r2: all true values are equal"


def test_places_that_cannot_be_written(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    message = refused(zoo, "-o", tmp_path / "file" / "run", "--target", "a", *SMALL)
    assert re.search(r"train: the folder '.*run' cannot be written: Not a directory; choose another --out", message)
    for name in ("HOME", "XDG_CACHE_HOME", "SNE_FAST_CACHE"):  # nothing needs the home folder or the cache
        monkeypatch.setenv(name, str(tmp_path / "file" / "no"))
    run(zoo, "-o", tmp_path / "run", "--target", "a", *SMALL)


FULL = """
import resource, sys
from sne_fast.cli.commands import app
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
app(sys.argv[1:])
"""


def test_a_full_disk_is_one_sentence_and_leaves_no_part(zoo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, "train", str(zoo), "-o", str(tmp_path), "--target", "a", *SMALL]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment_of_tests(), cwd=ELSEWHERE
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"sne-fast: fit: checkpoint '.*fit.pt' cannot be written: File too large; .*\n", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv"]


@pytest.mark.parametrize(("loss", "target", "outputs"), [("cross_entropy", "kind", 2), ("bce", "share", 1)])
def test_classes_and_probabilities(loss: str, target: str, outputs: int, zoo: Path, tmp_path: Path) -> None:
    output = run(zoo, "-o", tmp_path, "--target", target, "--loss", loss, *SMALL)
    predictor = sne_fast.Predictor.from_pretrained(tmp_path / "predictor")
    values = predictor(Zoo.open(zoo)[:4]).detach()
    assert values.shape == (4, outputs) and float(values.min()) >= 0 and float(values.max()) <= 1
    if loss == "cross_entropy":
        assert predictor.target_names == ("fast", "slow") and "held-out networks\taccuracy" in output
        assert (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "b"], "no column 'b'|'b'"),
        ([], "give at least one target; the zoo has a"),
        (["--target", "kind"], "column 'kind' must hold a number for every network"),
        (["--target", "a", "--loss", "cross_entropy", "--target", "mse"], "cross_entropy takes one column"),
        (["--target", "a", "--split", "kind"], "column 'kind' must say train, validation, test, got fast, slow"),
        (["--target", "a", "--invariance", "0.5"], "it needs units 'permuted' or 'canonical'"),
        (
            ["--target", "a", "--recipe", "worst"],
            "recipe: must be one of best, across, datasets, inr, paper, or a JSON file",
        ),
        (["--target", "a", "--recipe", "paper", "--no-chunks"], "chunks=False leaves statistics alone"),
        (["--target", "a", "--capture"], "the predictor is on cpu; move it to a CUDA device"),
        (["--target", "a", "--log", "none"], "'none' is not one of 'csv', 'tensorboard'"),
        (["--target", "a", "--loss", "bce"], r"targets of the loss 'bce' must lie in \[0, 1\]"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, zoo: Path, tmp_path: Path) -> None:
    command = ["train", str(zoo), "-o", str(tmp_path), *arguments, *SMALL]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})  # a line of usage errors is not broken
    assert result.exit_code == 2 and re.search(message, " ".join(result.output.split())), result.output


@pytest.mark.slow
def test_torchrun_gives_what_one_process_gives(zoo: Path, tmp_path: Path) -> None:
    arguments = ["train", str(zoo), "--target", "a", "--units", "permuted", "--chunks", *SMALL]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "sne_fast", *arguments, "-o", str(tmp_path / "two")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run(*arguments[1:], "--accumulate", "2", "-o", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2 and one["processes"] == 1
    assert two["history"]["train_loss"] == pytest.approx(one["history"]["train_loss"], rel=1e-3)
    assert done.stderr.count("epoch 3/3") == 1


def predictions(folder: Path, column: str) -> list[float]:
    with open(folder / "predictions.csv", newline="") as file:
        return [float(row[f"predicted {column}"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_get_the_very_predictions_of_the_report_under_every_recipe(
    recipe: str, zoo: Path, tmp_path: Path
) -> None:
    run(zoo, "-o", tmp_path / "run", "--target", "a", "--split", "part", "--recipe", recipe, *SMALL)
    held = Zoo.open(zoo)
    files = []
    for i in [i for i, part in enumerate(held.column("part")) if part == "test"]:
        files.append(tmp_path / f"{i:03d}.safetensors")
        save_file(held.state_dict(i), files[-1])
    predictor = sne_fast.Predictor.from_pretrained(tmp_path / "run" / "predictor")
    assert predictor(files)[:, 0].tolist() == pytest.approx(predictions(tmp_path / "run", "a"), rel=1e-4, abs=1e-5)
    used = find_recipe(tmp_path / "run" / "recipe.json")
    assert used == RECIPES[recipe].replace(epochs=3, batch_weights=12_000)
    run(zoo, "-o", tmp_path / "again", "--target", "a", "--split", "part", "--recipe", tmp_path / "run" / "recipe.json")
    assert predictions(tmp_path / "again", "a") == predictions(tmp_path / "run", "a")


def test_networks_without_a_target_are_refused_by_name_or_left_out(zoo: Path, tmp_path: Path) -> None:
    opened = Zoo.open(zoo)
    gaps = [None if i in (3, 17) else value for i, value in enumerate(opened.column("a").tolist())]
    opened.with_column("a", gaps).save(tmp_path / "zoo")
    message = refused(tmp_path / "zoo", "-o", tmp_path / "run", "--target", "a", *SMALL)
    assert "2 of 30 networks have no value in 'a': 'siren-0003', 'siren-0017'; leave them out" in message
    output = run(tmp_path / "zoo", "-o", tmp_path / "run", "--target", "a", "--drop-missing", *SMALL)
    assert "Left out for want of a target: 2 networks (siren-0003, siren-0017)" in output
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sum(found["networks"].values()) == 28 and found["left_out"] == ["siren-0003", "siren-0017"]


def test_a_folder_of_checkpoints_with_a_table(zoo: Path, tmp_path: Path) -> None:
    opened = Zoo.open(zoo)
    (tmp_path / "nets" / "late").mkdir(parents=True)
    lines = ["file,a,note"]
    for i in range(len(opened)):
        name = f"late/{i}.safetensors" if i > 20 else f"{i}.safetensors"
        save_file(opened.state_dict(i), tmp_path / "nets" / name)
        lines.append(f"{name},{opened.column('a')[i] if i != 4 else ''},x")
    (tmp_path / "nets" / "index.csv").write_text("\n".join(lines) + "\n")
    command = [tmp_path / "nets", "-o", tmp_path / "run", "--target", "a", *SMALL]
    assert "1 of 30 networks have no value in 'a': '4.safetensors'" in refused(*command)
    assert "Left out for want of a target: 1 networks (4.safetensors)" in run(*command, "--drop-missing")
    assert len(predictions(tmp_path / "run", "a")) == 2  # of 29, in one group
    (tmp_path / "nets" / "late" / "25.safetensors").unlink()
    assert "names" in refused(*command) and "25.safetensors, which is missing" in refused(*command)
    assert "holds neither a zoo" in refused(tmp_path, "-o", tmp_path / "run", "--target", "a")


def test_the_stack_is_a_row_and_predicts_files(zoo: Path, tmp_path: Path) -> None:
    output = run(zoo, "-o", tmp_path / "run", "--target", "a", "--target", "share", "--stack", *SMALL)
    assert "share, SNE and trees, mean" in output
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["baselines"]["SNE and trees, mean"]
    with open(tmp_path / "run" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"{zoo}/{row['name']}" for row in rows]
    command = ["predict", "--model", str(tmp_path / "run" / "predictor"), *names, "--json"]
    stacked, alone = (json.loads(CliRunner().invoke(app, [*command, *extra]).stdout) for extra in (["--stack"], []))
    errors = [abs(one["a"] - float(row["a"])) for one, row in zip(stacked, rows, strict=True)]
    assert sum(errors) / len(errors) == pytest.approx(found["a"]["mae"], rel=1e-4)
    assert [one["a"] for one in alone] == pytest.approx([float(row["predicted a"]) for row in rows], rel=1e-4)
    assert [one["a"] for one in stacked] != [one["a"] for one in alone]


def test_checkpoints_that_the_table_does_not_name_are_said(zoo: Path, tmp_path: Path) -> None:
    opened = Zoo.open(zoo)
    (tmp_path / "nets").mkdir()
    lines = ["file,a"]
    for i in range(20):
        save_file(opened.state_dict(i), tmp_path / "nets" / f"{i}.safetensors")
        if i != 7:
            lines.append(f"{i}.safetensors,{opened.column('a')[i]}")
    (tmp_path / "nets" / "index.csv").write_text("\n".join(lines) + "\n")
    output = run(tmp_path / "nets", "-o", tmp_path / "run", "--target", "a", *SMALL)
    assert "Not in index.csv, and not used: 1 checkpoints (7.safetensors)" in output


def test_units_of_unknown_symmetries_are_refused_with_what_to_do(tmp_path: Path) -> None:
    lines = ["file,a"]
    for i in range(12):
        save_file({"one.weight": torch.randn(4, 3), "two.weight": torch.randn(7, 9)}, tmp_path / f"{i}.safetensors")
        lines.append(f"{i}.safetensors,{i}")
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    message = refused(tmp_path, "-o", tmp_path / "run", "--target", "a", "--units", "canonical", *SMALL)
    assert "train: units 'canonical' need the networks' symmetries" in message and "use --units given" in message


def test_a_stack_of_an_earlier_call_does_not_stay(zoo: Path, tmp_path: Path) -> None:
    command = [zoo, "-o", tmp_path, "--target", "a", *SMALL]
    run(*command, "--stack")
    assert (tmp_path / "predictor" / "trees-0.safetensors").exists()
    run(*command, "--epochs", "4", "--buckets")  # on which only rounding depends
    assert not (tmp_path / "predictor" / "trees-0.safetensors").exists()
    assert "epochs" in refused(*command, "--epochs", "2")


SETTINGS_OF_STREAMS = [
    ["--recipe", "best", "--target", "a", "--target", "share"],
    ["--recipe", "inr", "--hidden-dim", "32", "--target", "kind", "--loss", "cross_entropy"],
    ["--recipe", "paper", "--hidden-dim", "32", "--units", "permuted", "--target", "share", "--transform", "logit"],
]


@pytest.mark.parametrize("chosen", SETTINGS_OF_STREAMS, ids=["best", "inr", "paper"])
def test_a_zoo_larger_than_memory_is_read_in_every_epoch(chosen: list[str], zoo: Path, tmp_path: Path) -> None:
    output = run(zoo, "-o", tmp_path / "run", "--max-memory", "300K", *chosen, *SMALL)
    sentence = "Networks are read from disk in every epoch: all of them would take about .* --max-memory is 300 KiB"
    assert len(re.findall(sentence, " ".join(output.split()))) == 1
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["read"] == "in every epoch" and found["history"]["validation_loss"]
    assert {"mean of the training networks", "layer statistics, boosted trees"} == set(found["baselines"])
    predictor = sne_fast.Predictor.from_pretrained(tmp_path / "run" / "predictor")
    with open(tmp_path / "run" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    held = Zoo.open(zoo)
    with torch.no_grad():
        values = predictor([held[held.find(row["name"])] for row in rows])
    names = predictor.target_names
    written = torch.tensor([[float(row[f"predicted {name}"]) for name in names] for row in rows])
    torch.testing.assert_close(written, values, rtol=1e-4, atol=1e-5)
    in_memory = run(zoo, "-o", tmp_path / "other", *chosen, *SMALL)
    assert "read from disk" not in in_memory
    other = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert other["read"] == "once" and other["networks"] == found["networks"]
    assert other["baselines"] == found["baselines"], "the same networks and targets"


def test_what_needs_all_networks_in_memory_is_refused(zoo: Path, tmp_path: Path) -> None:
    command = [zoo, "-o", tmp_path, "--target", "a", "--max-memory", "300K", *SMALL]
    message = refused(*command, "--stack")
    assert (
        "train: --stack needs all networks in memory. Networks are read" in message and "leave --stack out" in message
    )
    assert "--max-memory must be a number of bytes such as 8G or 500M, got 'much'" in refused(*command[:-5], "much")


def test_validation_networks_train_where_nothing_is_chosen_by_them(zoo: Path, tmp_path: Path) -> None:
    run(zoo, "-o", tmp_path / "run", "--target", "a", "--recipe", "across", *SMALL)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["networks"] == {"train": 27, "validation": 0, "test": 3}
    run(zoo, "-o", tmp_path / "apart", "--target", "a", "--recipe", "across", "--split", "part", *SMALL)
    assert json.loads((tmp_path / "apart" / "metrics.json").read_text())["networks"]["validation"] == 6
