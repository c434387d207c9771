"""The command line: what each command writes, and that every error is one sentence and exit code 2."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sne_fast
from helpers.command_line import call, fails
from sne_fast import SNE, Predictor
from sne_fast.backends import gpu_runs
from sne_fast.data.checkpoints import save_state_dict
from sne_fast.nn import Preparation
from sne_fast.nn.pretrained import described
from sne_fast.zoo import ZooWriter
from sne_fast.zoo.architectures import ARCHITECTURES


def test_help_names_the_commands_and_is_quiet():
    result = call("--help")
    assert result.exit_code == 0
    for word in ("demo", "encode", "predict", "info", "--debug"):
        assert word in result.stdout
    assert call().exit_code == 2  # no command: the help, and not success
    for command in ("demo", "encode", "predict", "info"):
        assert call(command, "--help").exit_code == 0
    assert call("--version").stdout == f"sne_fast {sne_fast.__version__}\n"


def program(*arguments, **environment):
    """Run the console script's function in a Python of its own."""
    started = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", "from sne_fast.cli.commands import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**started, **environment})


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from sne_fast.cli.commands import app\n"
        "for command in sys.argv[1:]:\n"
        "    assert app([*command.split(), '--help'], prog_name='sne-fast', standalone_mode=False) in (None, 0)\n"
        "app(['--version'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    commands = ["", "demo", "train", "task", "encode", "predict", "bench", "info"]
    commands += ["search", "duplicates", "lineage", "compare", "map"]
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: sne-fast") == len(commands)
    assert done.stdout.endswith(f"sne_fast {sne_fast.__version__}\n")


@pytest.mark.slow
def test_openmp_threads_sleep_while_they_wait_unless_the_user_says_otherwise():
    done = program("info", OMP_DISPLAY_ENV="TRUE")
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this torch brings an OpenMP that does not show its settings")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in program("info", OMP_DISPLAY_ENV="TRUE", OMP_WAIT_POLICY="active").stderr


def test_the_shell_completes_commands_and_choices():
    script = program(_SNE_FAST_COMPLETE="source_bash")
    assert script.returncode == 0 and "complete -o default -F" in script.stdout and "sne-fast" in script.stdout
    for words, position, found in [("en", 1, ["encode"]), ("train --log ", 3, ["csv", "tensorboard"])]:
        asked = {"COMP_WORDS": f"sne-fast {words}", "COMP_CWORD": str(position)}
        assert program(_SNE_FAST_COMPLETE="complete_bash", **asked).stdout.split() == found


def test_encode_npz(files, tmp_path):
    out = tmp_path / "z.npz"
    result = call("encode", *files, "-o", out)
    assert result.exit_code == 0 and result.stderr == "", result.output
    shipped = SNE.from_pretrained("sne-small")
    with np.load(out) as stored:
        assert stored["name"].tolist() == [str(f) for f in files]
        vectors = stored["vector"]
        made_by = json.loads(str(stored["sne_fast"]))
    assert made_by["model"] == "SNE" and made_by["weights_sha256"] == described(shipped)["weights_sha256"]
    assert made_by["options"] == {} and made_by["sne_fast_version"] == sne_fast.__version__
    assert call("encode", files[0], "-o", out, "--rebuild", "--nonfinite", "zero").exit_code == 0
    with np.load(out) as stored:
        assert json.loads(str(stored["sne_fast"]))["options"] == {"nonfinite": "zero", "rebuild": True}
    with torch.no_grad():
        expected = shipped(files)
    np.testing.assert_allclose(vectors, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "net0.safetensors",
        "net1.safetensors",
        "net2.safetensors",
        "z.npz",
    ]


def test_encode_without_a_model_takes_the_one_of_the_package(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time the folder is there
        assert call("encode", *files, "-o", "sne-small").exit_code == 0
    SNE(hidden_dim=32).save_pretrained("sne-small")
    assert call("encode", *files, "-o", "z.npz").exit_code == 0
    with np.load("z.npz") as stored:
        assert stored["vector"].shape == (3, 192)


def test_encode_parquet_with_a_model(files, model, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    result = call("encode", *files, "-o", tmp_path / "z.parquet", "--model", model)
    assert result.exit_code == 0 and result.stderr == ""
    made_by = json.loads(pq.read_schema(tmp_path / "z.parquet").metadata[b"sne_fast"])
    assert made_by["model"] == "Predictor" and len(made_by["weights_sha256"]) == 64
    table = pq.read_table(tmp_path / "z.parquet").to_pydict()
    assert table["name"] == [str(f) for f in files]
    with torch.no_grad():
        expected = Predictor.from_pretrained(model).encoder(files)
    np.testing.assert_allclose(np.array(table["vector"]), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_encode_with_a_saved_encoder(files, tmp_path):
    encoder = SNE(hidden_dim=32).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    assert call("encode", files[0], "-o", tmp_path / "z.npz", "--model", tmp_path / "encoder").exit_code == 0
    with np.load(tmp_path / "z.npz") as stored, torch.no_grad():
        np.testing.assert_allclose(stored["vector"], encoder(files[:1]).numpy(), rtol=1e-4, atol=1e-5)


def test_batches_change_nothing(files, tmp_path, monkeypatch):
    call("encode", *files, "-o", tmp_path / "a.npz")
    monkeypatch.setattr("sne_fast.cli.running.BATCH_WEIGHTS", 1)
    call("encode", *files, "-o", tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        np.testing.assert_allclose(a["vector"], b["vector"], rtol=1e-4, atol=1e-5)


def test_a_zoo_folder_stands_for_its_networks(tmp_path, model):
    with ZooWriter(tmp_path / "zoo") as writer:
        for i in range(2):
            writer.add(f"n{i}", torch.nn.Linear(3, 2).state_dict(), {"accuracy": 0.5})
    result = call("predict", "--model", model, tmp_path / "zoo", "-o", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    with open(tmp_path / "p.csv", newline="") as stream:
        names = [row["name"] for row in csv.DictReader(stream)]
    assert names == [str(tmp_path / "zoo" / f"n{i}") for i in range(2)]
    one = call("predict", "--model", model, tmp_path / "zoo" / "n1", "-o", tmp_path / "one.csv")
    assert one.exit_code == 0, one.output
    both, alone = (list(csv.reader((tmp_path / name).read_text().splitlines())) for name in ("p.csv", "one.csv"))
    assert alone[1][0] == both[2][0] and float(alone[1][1]) == pytest.approx(float(both[2][1]), rel=1e-4)
    missing = call("predict", "--model", model, tmp_path / "zoo" / "n2")
    assert missing.exit_code == 2 and "has no network 'n2'" in missing.output


def test_predict_table_csv_and_json(files, model, tmp_path):
    with torch.no_grad():
        expected = Predictor.from_pretrained(model)(files).numpy()
    result = call("predict", "--model", model, *files, "-o", tmp_path / "p.json")
    assert result.exit_code == 0
    assert "accuracy" in result.stdout and f"{expected[0, 0]:.4g}"[:5] in result.stdout
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["name"] for row in rows] == [str(f) for f in files]
    found = np.array([[row["accuracy"], row["loss"]] for row in rows])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert call("predict", "--model", model, *files, "-o", tmp_path / "p.csv").exit_code == 0
    with open(tmp_path / "p.csv", newline="") as stream:
        assert [float(row["loss"]) for row in csv.DictReader(stream)] == [row["loss"] for row in rows]


def test_a_target_called_name_takes_no_other_column(files, tmp_path):
    predictor = Predictor(SNE(hidden_dim=32), 2, (8,), target_names=["name", "name (2)"])
    predictor.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = Predictor.from_pretrained(tmp_path / "model")(files).numpy()
    for out in ("p.json", "p.csv"):
        assert call("predict", "--model", tmp_path / "model", *files, "-o", tmp_path / out).exit_code == 0
    with open(tmp_path / "p.csv", newline="") as stream:
        tables = [list(csv.DictReader(stream)), json.loads((tmp_path / "p.json").read_text())]
    for rows in tables:
        assert [row["name"] for row in rows] == [str(f) for f in files]
        found = np.array([[float(row["name (3)"]), float(row["name (2)"])] for row in rows])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_encode_gives_the_vectors_that_the_predictors_head_takes(files, tmp_path):
    for i, (scale, options) in enumerate(
        (
            ("none", {"normalise_inputs": "fan_in"}),
            ("none", {"normalise_inputs": "zoo"}),
            ("tensor", {"preparation": Preparation(units="canonical", relative=True)}),
        )
    ):
        predictor = Predictor(SNE(hidden_dim=32, scale=scale), hidden_features=(8,), **options).eval()
        predictor.set_inputs(predictor.pack(files))
        predictor.save_pretrained(tmp_path / f"model{i}")
        out = tmp_path / f"z{i}.npz"
        assert call("encode", *files, "--model", tmp_path / f"model{i}", "-o", out).exit_code == 0
        with torch.no_grad():
            expected = predictor.encode(files)
            plain = predictor.encoder(files)
        np.testing.assert_allclose(np.load(out)["vector"], expected.numpy(), rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-3


def test_an_architecture_that_a_predictor_cannot_sort_is_one_sentence(tmp_path):
    Predictor(SNE(hidden_dim=32), preparation=Preparation(units="canonical")).save_pretrained(tmp_path / "model")
    save_state_dict(ARCHITECTURES["vit"]().state_dict(), tmp_path / "vit.safetensors")
    message = fails("predict", "--model", tmp_path / "model", tmp_path / "vit.safetensors")
    assert "cannot be brought into canonical order" in message and "no plain chain of layers" in message
    save_state_dict(ARCHITECTURES["mlp-10"]().state_dict(), tmp_path / "mlp.safetensors")
    both = call(
        "predict", "--model", tmp_path / "model", *(tmp_path / f"{n}.safetensors" for n in ("vit", "mlp")),
        "-o", tmp_path / "p.json",
    )  # fmt: skip
    assert both.exit_code == 1 and "canonical order" in both.stderr
    assert [row["name"] for row in json.loads((tmp_path / "p.json").read_text())] == [str(tmp_path / "mlp.safetensors")]


def test_info():
    result = call("info")
    assert result.exit_code == 0
    for word in ("sne_fast", "python", "torch", "triton", "numpy", "cpu", "cuda", "reference", "chunk_encode"):
        assert word in result.stdout
    for backend in ("triton", "cuda"):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"backend {backend}")]
        runs = [run for run in gpu_runs.read() if run.backend == backend]
        assert all(run.device in line for run in runs)
        assert ("has not run on a GPU yet: checked in" in line) == (not runs)


def test_errors_are_one_sentence_and_leave_no_file(files, model, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    out = tmp_path / "z.npz"
    assert "no such file or folder" in fails("encode", tmp_path / "absent.pt", "-o", out)
    assert "must end in .npz or .parquet, or be a folder" in fails("encode", files[0], "-o", tmp_path / "z.txt")
    assert "folder of the output" in fails("encode", files[0], "-o", tmp_path / "no" / "z.npz")
    assert "holds no config.json" in fails("encode", files[0], "-o", out, "--model", tmp_path)
    assert "neither a folder nor a repository" in fails("encode", files[0], "-o", out, "--model", tmp_path / "a b")
    assert "device 'gpu' cannot be used" in fails("encode", files[0], "-o", out, "--device", "gpu")
    assert "must end in .csv or .json, got" in fails("predict", "--model", model, files[0], "-o", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_checkpoint_that_cannot_be_encoded_is_an_error_and_leaves_no_file(files, tmp_path):
    files[1].write_bytes(files[1].read_bytes()[:50])
    assert fails("encode", files[1], "-o", tmp_path / "z.npz").startswith(f"sne-fast: {files[1]}: ")
    save_state_dict({"w": torch.full((3, 2), float("nan"))}, files[1])
    message = fails("encode", files[1], "-o", tmp_path / "z.npz")
    assert message.startswith(f"sne-fast: {files[1]}: ") and "'w'" in message and "network 0" not in message
    assert not (tmp_path / "z.npz").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_an_empty_choice_of_a_backend_is_none(files, tmp_path, monkeypatch):
    monkeypatch.setenv("SNE_FAST_BACKEND", "")
    assert call("encode", files[0], "-o", tmp_path / "z.npz").exit_code == 0


def test_a_failed_write_leaves_the_old_file(files, tmp_path, monkeypatch):
    out = tmp_path / "z.npz"
    out.write_bytes(b"old")

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    assert "No space left on device" in fails("encode", *files, "-o", out)
    assert out.read_bytes() == b"old"
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_an_encoder_cannot_predict(files, tmp_path):
    SNE(hidden_dim=32).save_pretrained(tmp_path / "encoder")
    message = fails("predict", "--model", tmp_path / "encoder", files[0])
    assert "holds a SNE, expected Predictor" in message


def test_missing_packages_are_named(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = fails("encode", files[0], "-o", tmp_path / "z.parquet")
    assert 'pip install "sne_fast[parquet]"' in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "sne_fast[demo]"' in fails("demo", "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_backend_that_cannot_run(files, tmp_path, monkeypatch):
    monkeypatch.setenv("SNE_FAST_BACKEND", "cuda")
    assert "backend 'cuda' cannot run it" in fails("encode", files[0], "-o", tmp_path / "z.npz")
    monkeypatch.setenv("SNE_FAST_BACKEND", "fastest")
    assert "got 'fastest'" in fails("encode", files[0], "-o", tmp_path / "z.npz")


def test_demo_settings_that_cannot_work(tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "is not an empty folder" in fails("demo", "--out", tmp_path / "full")
    for options in (["--networks", 3], ["--epochs", 0], ["--hidden-dim", 30]):
        fails("demo", "--out", tmp_path / "new", *options)
        assert not (tmp_path / "new").exists()


def test_usage_errors_keep_exit_code_two(files):
    result = call("encode", files[0])
    assert result.exit_code == 2 and "--out" in result.output
    assert call("teleport").exit_code == 2


def test_debug_shows_the_traceback(tmp_path):
    result = call("--debug", "encode", tmp_path / "absent.pt", "-o", tmp_path / "z.npz")
    assert isinstance(result.exception, FileNotFoundError)


def test_bugs_are_not_hidden(files, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sne_fast.cli.encode.expand", broken)
    result = call("encode", files[0], "-o", tmp_path / "z.npz")
    assert isinstance(result.exception, RuntimeError)


def test_the_program_runs_what_is_installed_whatever_the_folder(tmp_path):
    program = Path(sys.executable).with_name("sne-fast")
    if not program.exists():
        pytest.skip(f"{program} is not there")
    (tmp_path / "sne_fast").mkdir()
    (tmp_path / "sne_fast" / "__init__.py").write_text("raise SystemExit('the folder, not the package')")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"sne_fast {sne_fast.__version__}\n"


@pytest.mark.slow
def test_the_memory_probe_runs_what_is_installed(tmp_path, monkeypatch):
    from sne_fast.benchmark import probe

    (tmp_path / "sne_fast").mkdir()
    (tmp_path / "sne_fast" / "__init__.py").write_text("raise SystemExit('the folder, not the package')")
    monkeypatch.chdir(tmp_path)
    assert probe("single", "forward", "sne_fast", size="tiny", threads=1, limit=1e12)["weights"] == 1153


@pytest.mark.slow
def test_as_a_program(files, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sne_fast", "encode"]
    good = subprocess.run(
        [*command, files[0], "-o", tmp_path / "z.npz"], capture_output=True, text=True, env=environment
    )
    assert good.returncode == 0, good.stderr
    assert "1 vectors of 192 numbers written" in good.stdout
    bad = subprocess.run(
        [*command, "absent.pt", "-o", "z.npz"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == "sne-fast: no such file or folder: 'absent.pt'\n"
