"""Results of many networks: which are written and shown how, when some fail, and under which names."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from helpers.command_line import call, fails, runner
from helpers.paths import ELSEWHERE
from sne_fast import SNE, Predictor
from sne_fast.cli import running
from sne_fast.cli.options import options_of
from sne_fast.data.checkpoints import load_state_dict, save_state_dict
from sne_fast.tasks.settings import option


def test_damaged_files_do_not_lose_the_others(files, model, tmp_path):
    call("encode", *files, "-o", tmp_path / "all.npz", "--model", model)
    files[1].write_bytes(files[1].read_bytes()[:50])
    result = call("encode", *files, "-o", tmp_path / "z.npz", "--model", model)
    assert result.exit_code == 1 and result.stdout == f"2 vectors of 32 numbers written to {tmp_path / 'z.npz'}\n"
    first, last = result.stderr.splitlines()
    assert first.startswith(f"sne-fast: {files[1]}: ")
    assert last == f"sne-fast: 1 of 3 networks failed; those of the others are written to {tmp_path / 'z.npz'}"
    with np.load(tmp_path / "all.npz") as whole, np.load(tmp_path / "z.npz") as part:
        assert part["name"].tolist() == [str(files[0]), str(files[2])]
        np.testing.assert_allclose(part["vector"], whole["vector"][[0, 2]], rtol=1e-4, atol=1e-5)
    result = call("predict", *files, "-o", tmp_path / "p.json", "--model", model, "--json")
    assert result.exit_code == 1 and len(json.loads(result.stdout)) == 2
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads(result.stdout)
    for file in files:
        file.write_bytes(b"")
    result = call("encode", *files, "-o", tmp_path / "none.npz")
    assert result.exit_code == 2 and not (tmp_path / "none.npz").exists()
    assert result.stderr.splitlines()[-1] == "sne-fast: none of the 3 networks could be used"
    assert all(str(file) in result.stderr for file in files)


def test_weights_that_are_not_finite(files, tmp_path):
    save_state_dict({"w": torch.tensor([[1.0, float("nan")], [2.0, 3.0]])}, files[1])
    save_state_dict({"w": torch.tensor([[1.0, 0.0], [2.0, 3.0]])}, files[2])
    assert call("encode", *files[1:], "-o", tmp_path / "z.npz", "--nonfinite", "zero").exit_code == 0
    with np.load(tmp_path / "z.npz") as stored:
        np.testing.assert_allclose(stored["vector"][0], stored["vector"][1], rtol=1e-5, atol=1e-6)
    assert call("encode", files[1], "-o", tmp_path / "k.npz", "--nonfinite", "keep").exit_code == 0
    with np.load(tmp_path / "k.npz") as stored:
        assert np.isnan(stored["vector"]).all()
    assert call("encode", files[1], "-o", tmp_path / "z.npz", "--nonfinite", "drop").exit_code == 2


def test_predictions_that_are_no_numbers_are_null_in_json(files, model, tmp_path):
    save_state_dict({"w": torch.tensor([[1.0, float("nan")], [2.0, 3.0]])}, files[1])
    result = call("predict", files[1], "--model", model, "--nonfinite", "keep", "--json", "-o", tmp_path / "p.json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout, parse_constant=lambda text: pytest.fail(text))
    assert rows == [{"name": str(files[1]), "accuracy": None, "loss": None}]
    assert json.loads((tmp_path / "p.json").read_text()) == rows


def test_predictions_for_another_program_are_lines_with_tabs_and_all_digits(files, model):
    with torch.no_grad():
        expected = Predictor.from_pretrained(model)(files).numpy()
    lines = call("predict", "--model", model, *files).stdout.splitlines()
    assert lines[0] == "name\taccuracy\tloss" and len(lines) == 4
    cells = [line.split("\t") for line in lines[1:]]
    assert [row[0] for row in cells] == [str(f) for f in files]
    np.testing.assert_allclose(np.array([row[1:] for row in cells], np.float32), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["net[v2].pt", "[", "[bold]x.pt", ":smile:.pt", "caf\u00e9 $x$.pt", "a\x1b[2J.pt"])
def test_names_of_files_are_shown_as_they_are(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Linear(3, 2).state_dict(), "net.pt")
    os.rename("net.pt", name if name.endswith(".pt") else f"{name}.pt")
    name = name if name.endswith(".pt") else f"{name}.pt"
    shown = name.replace("\x1b", "\\x1b")
    found = call("predict", "--model", model, name)
    assert found.exit_code == 0 and found.stdout.splitlines()[1].split("\t")[0] == shown
    assert json.loads(call("predict", "--model", model, name, "--json").stdout)[0]["name"] == name
    Path(name).write_bytes(b"")
    found = call("predict", "--model", model, name)
    assert found.exit_code == 2 and shown in found.stderr and "Traceback" not in found.output


def test_missing_files_and_odd_options_are_named_as_they_are(model):
    assert "'[/b].pt'" in fails("predict", "--model", model, "[/b].pt")
    assert "[/b]" in call("encode", "a.pt", "-o", "z.npz", "--nonfinite", "[/b]").output
    assert "no such option" in call("encode", "--[bold]").output.lower()


def test_help_is_shown_without_markup():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        name: str = option("x", help="A name as net[v2].pt; needs sne_fast[tasks].")

    @options_of(Settings)
    def command(settings: Settings) -> None:
        """Read [bold]nothing[/bold] of net[v2].pt."""

    program = typer.Typer(rich_markup_mode="rich")
    program.command()(command)
    shown = " ".join(runner.invoke(program, ["--help"]).output.replace("\u2502", "").split())
    for text in ("Read [bold]nothing[/bold] of net[v2].pt.", "A name as net[v2].pt; needs sne_fast[tasks]."):
        assert text in shown


def test_names_of_bytes_that_are_no_characters_can_be_written(model, tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/net\xff.pt"))
    file.write_bytes(b"")
    assert running.expand([file]) == [(str(tmp_path / "net\\udcff.pt"), file)]
    assert "net\\udcff.pt" in fails("predict", "--model", model, file)


def test_outputs_that_cannot_be_written_are_found_before_the_work(files, tmp_path, monkeypatch):
    monkeypatch.setattr("sne_fast.cli.encode.run_in_batches", lambda *a, **k: pytest.fail("it has worked"))
    os.mkfifo(tmp_path / "pipe.npz")
    assert "is no regular file" in fails("encode", files[0], "-o", tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder" in fails("encode", files[0], "-o", tmp_path / "folder.npz")
    assert "File name too long" in fails("encode", files[0], "-o", tmp_path / f"{'a' * 300}.npz")

    def refused(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    message = fails("encode", files[0], "-o", tmp_path / "z.npz")
    assert "the folder of the output" in message and "cannot be written: Permission denied" in message


CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
GPU_MESSAGE = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which ..."


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory with {weights}"),
        (RuntimeError(CPU_MESSAGE), "out of memory with {weights}; 4,000,000,000,000 bytes more were needed"),
        (torch.OutOfMemoryError(GPU_MESSAGE), "out of the GPU's memory with {weights}; 2.50 GiB more were needed"),
    ],
    ids=["python", "cpu", "gpu"],
)
def test_out_of_memory_is_one_sentence_and_loses_no_other_network(files, tmp_path, monkeypatch, error, message):
    forward = SNE.forward

    def limited(self, batch):
        if batch.num_weights > 25:
            raise error
        return forward(self, batch)

    monkeypatch.setattr(SNE, "forward", limited)  # the networks have 23, 30 and 37 weights
    result = call("encode", *files, "-o", tmp_path / "z.npz")
    assert result.exit_code == 1, result.output
    assert f"sne-fast: {files[1]}: {message.format(weights='30 weights')}" in result.stderr.splitlines()
    with np.load(tmp_path / "z.npz") as stored:
        assert stored["name"].tolist() == [str(files[0])]
    assert message.format(weights="37 weights") in fails("encode", files[2], "-o", tmp_path / "z.npz")

    def nothing(paths, key):
        raise error

    monkeypatch.setattr("sne_fast.cli.encode.expand", nothing)
    assert message.replace(" with {weights}", "") in fails("encode", files[0], "-o", tmp_path / "z.npz")


@pytest.mark.slow
def test_a_reader_that_stops_reading_is_no_error(files, model):
    command = [sys.executable, "-m", "sne_fast", "predict", "--model", str(model), *map(str, files)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ELSEWHERE)
    started.stdout.close()
    assert started.stderr.read() == b"" and started.wait() == 1


def test_a_folder_of_checkpoints_stands_for_each_of_them(tmp_path, files):
    folder = tmp_path / "nets"
    folder.mkdir()
    for k, name in ((0, "net10.pt"), (1, "net9.pt"), (2, "net1.safetensors")):
        state_dict = load_state_dict(files[k])
        save_state_dict(state_dict, folder / name) if name.endswith("safetensors") else torch.save(
            state_dict, folder / name
        )
    (folder / "training_args.bin").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    assert call("encode", folder, "-o", tmp_path / "z.npz").exit_code == 0
    call("encode", files[2], files[1], files[0], "-o", tmp_path / "each.npz")
    with np.load(tmp_path / "z.npz") as stored, np.load(tmp_path / "each.npz") as each:
        names = [str(folder / name) for name in ("net1.safetensors", "net9.pt", "net10.pt")]
        assert stored["name"].tolist() == names
        np.testing.assert_allclose(stored["vector"], each["vector"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        ["model-00001-of-00002.safetensors", "other.safetensors"],
        ["a.pt", "a.safetensors", "b.pt"],
        ["a.pt", "b.pt", "config.json"],
        ["a.safetensors", "b.safetensors", "c.safetensors.index.json"],
    ],
)
def test_a_folder_whose_files_may_belong_together_is_not_taken_apart(tmp_path, files, names):
    folder = tmp_path / "nets"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(files[0].read_bytes())
    assert str(folder) in fails("encode", folder, "-o", tmp_path / "z.npz")


def test_the_key_of_weights_among_several(tmp_path, files, model):
    generator, encoder = (load_state_dict(file) for file in files[:2])
    torch.save({"generator": generator, "model": {"encoder": encoder}}, tmp_path / "both.pt")
    assert "both.pt" in fails("predict", "--model", model, tmp_path / "both.pt")
    for key, file in (("generator", files[0]), ("model.encoder", files[1])):
        found = json.loads(call("predict", "--model", model, tmp_path / "both.pt", "--key", key, "--json").stdout)[0]
        alone = json.loads(call("predict", "--model", model, file, "--json").stdout)[0]
        assert found["accuracy"] == pytest.approx(alone["accuracy"], rel=1e-4)
    message = fails("predict", "--model", model, tmp_path / "both.pt", "--key", "critic")
    assert message.startswith(f"sne-fast: {tmp_path / 'both.pt'}: ") and "critic" in message


def test_a_key_does_not_hide_that_an_order_of_definition_is_lost(tmp_path, files):
    SNE(hidden_dim=32, order="definition").eval().save_pretrained(tmp_path / "encoder")
    torch.save({"net": load_state_dict(files[0])}, tmp_path / "a.pt")
    ask = ("-o", tmp_path / "z.npz", "--model", tmp_path / "encoder")
    assert call("encode", tmp_path / "a.pt", *ask, "--key", "net").exit_code == 0
    assert call("encode", tmp_path / "a.pt", *ask).exit_code == 0
    message = fails("encode", files[0], *ask, "--key", "net")
    assert message.startswith(f"sne-fast: {files[0]}: ") and "a file of safetensors is flat" in message


def test_a_network_that_a_predictor_cannot_prepare_does_not_lose_the_others(files, model, tmp_path, monkeypatch):
    encode = Predictor.forward

    def forward(self, batch):
        if batch.num_weights > 25:
            raise ValueError("network 0 ('x'): has no symmetry")
        return encode(self, batch)

    monkeypatch.setattr(Predictor, "forward", forward)  # the networks have 23, 30 and 37 weights
    result = call("predict", "--model", model, *files, "--json")
    assert result.exit_code == 1 and [row["name"] for row in json.loads(result.stdout)] == [str(files[0])]
    assert [line.partition(": ")[2].partition(": ")[0] for line in result.stderr.splitlines()[:2]] == [
        str(file) for file in files[1:]
    ]


def test_what_is_left_out_of_the_networks_is_one_line(tmp_path, model):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4))
    for k in range(2):
        torch.save(net.state_dict(), tmp_path / f"net{k}.pt")
    result = call("encode", tmp_path / "net0.pt", tmp_path / "net1.pt", "-o", tmp_path / "z.npz", "--model", model)
    assert result.exit_code == 0
    assert result.stderr == "sne-fast: left out: 4 num_batches_tracked counters\n"
    torch.save({"net": net.state_dict(), "other": {"w": torch.ones(3)}}, tmp_path / "two.pt")
    result = call("predict", tmp_path / "two.pt", "--key", "net", "--model", model, "--json")
    assert result.exit_code == 0 and len(json.loads(result.stdout)) == 1
    assert result.stderr.startswith("sne-fast: left out: ") and "2 num_batches_tracked counters" in result.stderr
