"""`sne-fast encode` to a folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.command_line import call
from helpers.many_networks import network
from sne_fast import SNE
from sne_fast.embedding import collect

pytest.importorskip("pyarrow")


def test_encode_to_a_folder_resumes_and_records_failures(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    first = call("encode", tree, "-o", out)
    assert first.exit_code == 1 and "7 networks are done" in " ".join(first.stdout.split())
    assert f"sne-fast: {tree / 'damaged.safetensors'}: is damaged" in " ".join(first.stderr.split())
    (tree / "damaged.safetensors").unlink()
    again = call("encode", tree, "-o", out)
    assert again.exit_code == 0 and "0 of them by this call" in " ".join(again.stdout.split())
    save_file(network(3), tree / "new.safetensors")
    more = call("encode", tree, "-o", out)
    assert more.exit_code == 0 and collect(out).num_rows == 9  # with the damaged file, as it was
    assert "8 networks are done" in " ".join(more.stdout.split()) and "1 of them by this call" in more.stdout
    with torch.no_grad():
        want = SNE.from_pretrained("sne-small")([tree / "one"])[0]
    rows = {Path(row["uri"]).name: row["vector"] for row in collect(out).to_pylist()}
    torch.testing.assert_close(torch.tensor(rows["one"]), want, rtol=0, atol=1e-5)


def test_failures_are_encoded_again_with_retry(tree: Path, tmp_path: Path) -> None:
    (tree / "damaged.safetensors").unlink()
    out = tmp_path / "vectors"
    first = call("encode", tree / "large.pt", "--layers", "-o", out, "--max-memory", "1M")
    said = " ".join(first.stderr.split())
    assert first.exit_code == 1 and "encoding needs" in said and "1 of 1 networks failed" in said
    assert "0 networks are done" in " ".join(first.stdout.split())
    assert call("encode", tree / "large.pt", "--layers", "-o", out).exit_code == 1
    again = call("encode", tree / "large.pt", "--layers", "-o", out, "--retry")
    assert again.exit_code == 0 and "1 of them by this call" in " ".join(again.stdout.split())


def test_on_error_stop_names_the_first_failure_and_a_later_call_goes_on(tree: Path, tmp_path: Path) -> None:
    (tree / "damaged.safetensors").unlink()
    save_file({"a.weight": torch.full((2, 2), float("nan"))}, tree / "several" / "net3.safetensors")
    out = tmp_path / "vectors"
    stopped = call("encode", tree, "-o", out, "--on-error", "stop")
    said = " ".join(stopped.stderr.split())
    assert stopped.exit_code == 2 and "net3.safetensors: tensor 'a.weight' has 4 NaN" in said
    again = call("encode", tree, "-o", out)
    assert again.exit_code == 1 and "6 networks are done" in " ".join(again.stdout.split())


def test_shares_together_are_the_whole(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sne_fast.embedding.units.MOST", 2)
    monkeypatch.setattr("sne_fast.reports.terminal.LINE_SECONDS", 0)
    (tree / "damaged.safetensors").unlink()
    for i in range(3):
        result = call("encode", tree, "-o", tmp_path / "vectors", "--shard", f"{i}/3")
        assert result.exit_code == 0
        line = r"Encoding: \d+%, \d of \d networks, [\d.]+ networks/s, [\d.]+ [kM]? ?weights/s, \d+ s left"
        assert re.search(line, result.stderr)
    assert collect(tmp_path / "vectors").column("error").null_count == 7
    assert "0 of them by this call" in " ".join(call("encode", tree, "-o", tmp_path / "vectors").stdout.split())


def test_a_list_of_paths_does_for_a_small_file_too(tree: Path, tmp_path: Path) -> None:
    paths = [str(tree / "large.pt"), *(str(tree / "several" / f"net{i}.safetensors") for i in range(5))]
    (tmp_path / "list.txt").write_text(f"{paths[0]}\n\n{tree / 'several'}\n")
    assert call("encode", f"@{tmp_path / 'list.txt'}", "-o", tmp_path / "z.npz").exit_code == 0
    with np.load(tmp_path / "z.npz") as stored:
        assert stored["name"].tolist() == paths


def test_bad_options_of_folders_are_refused(tree: Path, tmp_path: Path) -> None:
    for options, said in (
        (["-o", tmp_path / "z.npz", "--workers", 2], "--workers needs a folder as --out"),
        (["-o", tmp_path / "z.npz", "--on-error", "stop"], "--on-error stop needs a folder as --out"),
        (["-o", tmp_path / "z", "--workers", 2, "--scheduler", "tcp://a:1"], "a cluster of --scheduler has its own"),
        (["-o", tmp_path / "z", "--shard", "3/3"], "--shard must be i/n"),
        (["-o", tmp_path / "z.csv"], "must end in .npz or .parquet, or be a folder"),
        (["-o", tmp_path / "z", "--on-error", "stop"], "damaged.safetensors"),
    ):
        result = call("encode", tree, *options)
        assert result.exit_code == 2 and said in " ".join(result.stderr.split())
