"""`sne-fast predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..atomic_files import replacing, write_json
from ..tasks.settings import option
from .options import options_of
from .running import PATHS, check_output, expand, print_table, run_in_batches, usable_device


@dataclass(frozen=True)
class PredictSettings:
    """Options of `sne-fast predict`."""

    paths: tuple[Path, ...] = option(help=PATHS, argument=True, metavar="PATH")
    model: str = option(help="Folder (or Hub repository) of a trained predictor.")
    out: Path | None = option(None, help="Also write to .csv or .json.", flags=("--out", "-o"))
    device: str = option("cpu", help="Device to run on, such as cpu or cuda.")


@options_of(PredictSettings)
def predict(settings: PredictSettings) -> None:
    """Predict properties of networks with a trained predictor."""
    import csv

    from ..nn.predictor import Predictor

    out = settings.out
    if out is not None:
        check_output(out, (".csv", ".json"))
    names, files = expand(settings.paths)
    predictor = Predictor.from_pretrained(settings.model, device=usable_device(settings.device))
    values = run_in_batches(predictor, files, predictor.pack)
    targets = predictor.target_names
    rows = [
        {"name": name, **{target: float(value) for target, value in zip(targets, row, strict=True)}}
        for name, row in zip(names, values, strict=True)
    ]
    if out is not None and out.suffix == ".json":
        write_json(out, rows)
    elif out is not None:
        with replacing(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print_table(
        ["name", *targets],
        [[name, *(f"{float(value):.4g}" for value in row)] for name, row in zip(names, values, strict=True)],
    )
