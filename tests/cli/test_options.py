"""Options are made from settings classes: names, types, choices, defaults and what the command is given."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

import sne_fast
from sne_fast.benchmark.short import run_short
from sne_fast.cli.bench import BenchSettings
from sne_fast.cli.encode import DEFAULT, EncodeSettings
from sne_fast.cli.options import options_of
from sne_fast.cli.predict import PredictSettings
from sne_fast.tasks.settings import option


@dataclass(frozen=True)
class Bread:
    """Settings of a baker."""

    ovens: tuple[Path, ...] = option(help="Ovens.", argument=True, metavar="OVEN")
    out: Path = option(help="Shelf.", flags=("--out", "-o"))
    flour: Literal["wheat", "rye"] = option("rye", help="Flour.")
    minutes: int = option(50, help="Time.", min=1, max=90)
    salt: float | None = option(None, help="Salt.", shown="enough")
    seeds: tuple[str, ...] = option(("poppy",), help="Seeds.", flags=("--seed",), shown="poppy")
    slow_dough: bool = option(False, help="Let it rise overnight.")
    secret: int = 7


def bake(*arguments: str) -> tuple[Any, list[Bread]]:
    baked: list[Bread] = []
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @app.command()
    @options_of(Bread)
    def loaf(settings: Bread) -> None:
        """Bake a loaf."""
        baked.append(settings)

    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"}), baked


def test_defaults_are_those_of_the_class() -> None:
    result, baked = bake("a", "b", "-o", "shelf")
    assert result.exit_code == 0, result.output
    assert baked == [Bread((Path("a"), Path("b")), Path("shelf"))]


def test_every_kind_of_option_reaches_the_command() -> None:
    given = ["--flour", "wheat", "--minutes", "60", "--salt", "0.5", "--seed", "flax", "--seed", "hemp", "--slow-dough"]
    result, baked = bake("a", "--out", "shelf", *given)
    assert result.exit_code == 0, result.output
    assert baked == [Bread((Path("a"),), Path("shelf"), "wheat", 60, 0.5, ("flax", "hemp"), True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "shelf"], "Missing argument"),
        (["a"], "Missing option '--out'"),
        (["a", "-o", "shelf", "--flour", "oats"], "'oats' is not one of 'wheat', 'rye'"),
        (["a", "-o", "shelf", "--minutes", "91"], "Invalid value for '--minutes'"),
        (["a", "-o", "shelf", "--secret", "1"], "No such option"),
        (["a", "-o", "shelf", "--no-slow-dough"], "No such option"),
    ],
)
def test_mistakes_are_usage_errors(arguments: list[str], message: str) -> None:
    result, baked = bake(*arguments)
    assert result.exit_code == 2 and message in result.output and not baked


def test_help_shows_choices_and_defaults() -> None:
    result, _ = bake("--help")
    for text in ("Bake a loaf.", "OVEN", "wheat|rye", "[default: rye]", "[default: (enough)]", "[default: (poppy)]"):
        assert text in result.output
    assert "secret" not in result.output


def test_defaults_of_the_commands_are_those_of_what_they_call() -> None:
    of_bench = {name: parameter.default for name, parameter in inspect.signature(run_short).parameters.items()}
    given = BenchSettings()
    assert [given.cases, given.rounds, given.backend, given.threads] == [
        of_bench[name] for name in ("cases", "rounds", "backend", "threads")
    ]
    encode = EncodeSettings((Path("net"),), Path("out.npz"))
    assert encode.model is None
    assert sne_fast.SNE.from_pretrained(DEFAULT).config["set_attention"] == "isab"  # files may be of any size
    assert PredictSettings((Path("net"),), "model").device == encode.device == "cpu"
