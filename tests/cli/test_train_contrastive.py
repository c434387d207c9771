"""train --objective contrastive: what it writes, that it resumes, and what it refuses."""

import json

import pytest
import torch

import sne_fast
from helpers.command_line import call, fails
from sne_fast.zoo import Zoo, make_family_zoo

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families") / "zoo"
    make_family_zoo(folder, 3, max_steps=3, scale=0.2, architectures=["mlp", "siren"])
    return folder


def test_it_writes_an_encoder_and_resumes(zoo, tmp_path):
    command = ["train", zoo, "-o", tmp_path / "run", "--objective", "contrastive", "--hidden-dim", 32]
    command += ["--batch-weights", 6000, "--max-chunks", 4, "--target", "family"]
    result = call(*command, "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "encoder/, recipe.json, metrics.json" in result.stdout and "family" in result.stdout
    result = call(*command, "--epochs", 2)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["history"]["validation_loss"]) == 2 and metrics["networks"] == {"train": 24, "validation": 12}
    assert metrics["command"]["objective"] == "contrastive" and metrics["left_out"] == []
    encoder = sne_fast.SNE.from_pretrained(tmp_path / "run" / "encoder")
    assert encoder.config["statistics"] == "relative" and encoder.config["set_attention"] == "isab"
    assert encoder([torch.nn.Linear(4, 3)]).shape == (1, 96)
    result = call(*command, "--seed", 1)
    assert result.exit_code == 2 and "seed" in result.stderr


def test_without_targets_the_encoder_is_calibrated(zoo, tmp_path):
    options = ["--objective", "contrastive", "--no-chunks", "--hidden-dim", 32, "--batch-weights", 6000]
    for name, more in (("calibrated", []), ("plain", ["--target", "family"])):
        result = call("train", zoo, "-o", tmp_path / name, *options, "--epochs", 1, *more)
        assert result.exit_code == 0, result.output
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["calibrated"] == (not more)
    off = {}
    for name in ("calibrated", "plain"):
        z = sne_fast.SNE.from_pretrained(tmp_path / name / "encoder").encode(Zoo.open(zoo))[:, 32:].double()
        off[name] = float(z.mean(0).norm() / z.std(0).norm())
    # Their mean over views of two thirds of these networks is zero.
    assert off["calibrated"] < 0.5 < off["plain"], off


def test_what_does_not_fit_is_refused(zoo, tmp_path):
    start = ["train", zoo, "-o", tmp_path / "run"]
    refused = fails(*start, "--objective", "contrastive", "--stack")
    assert "--workers, --buckets and --capture are for predictors" in refused
    refused = fails(*start, "--objective", "contrastive", "--recipe", "across", "--loss", "bce")
    assert "the contrastive objective has no use for relative, ranking, input_scale, loss; leave" in refused
    assert "--max-chunks is for the contrastive" in fails(*start, "--target", "test_loss", "--max-chunks", 4)
