"""`sne-fast predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..atomic_files import to_json, write_json
from ..data.choices import NonFinite
from ..tasks.settings import check_choices, option
from .options import options_of
from .running import (
    KEY,
    NONFINITE,
    PATHS,
    REBUILD,
    check_output,
    expand,
    report,
    run_in_batches,
    stdout,
)


@dataclass(frozen=True)
class PredictSettings:
    """Options of `sne-fast predict`."""

    paths: tuple[str, ...] = option(help=PATHS, argument=True, metavar="PATH")
    model: str = option(help="Folder (or Hub repository) of a trained predictor.")
    stack: bool = option(False, help="Average with the boosted trees that train --stack has saved beside the model.")
    out: Path | None = option(None, help="Also write to .csv or .json.", flags=("--out", "-o"))
    json: bool = option(False, help="Print JSON instead of a table.")
    device: str = option("cpu", help="Device to run on, such as cpu or cuda.")
    key: str | None = option(None, help=KEY, shown="the only one")
    nonfinite: NonFinite | None = option(None, help=NONFINITE, shown="raise, or as the model was trained")
    rebuild: bool = option(False, help=REBUILD)

    def __post_init__(self) -> None:
        check_choices(self, "predict")


@options_of(PredictSettings)
def predict(settings: PredictSettings) -> None:
    """Predict properties of networks with a trained predictor.

    Prints a table, or where stdout is no terminal lines with tabs between cells. Networks that cannot be read are named
    at the end, with exit code 1; the predictions for all others are printed and written.
    """
    from ..nn.predictor import Predictor
    from ..reports.files import distinct_columns, write_csv
    from ..reports.terminal import show_table
    from ..tasks.stacking import StackedPredictor

    out, console = settings.out, stdout()
    if out is not None:
        check_output(out, (".csv", ".json"))
    networks = expand(settings.paths, settings.key)
    if settings.stack:
        stacked = StackedPredictor.from_pretrained(settings.model, device=settings.device)
        predictor, module = stacked.predictor, stacked.__call__
    else:
        predictor = Predictor.from_pretrained(settings.model, device=settings.device)
        module = predictor.__call__
    results = run_in_batches(
        module, networks, predictor.pack, console, key=settings.key, nonfinite=settings.nonfinite,
        rebuild=settings.rebuild,
    )  # fmt: skip
    columns = distinct_columns(["name", *predictor.target_names])
    rows = [[name, *map(float, values)] for name, values in zip(results.names, results.values, strict=True)]
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    if out is not None and out.suffix == ".json":
        write_json(out, records)
    elif out is not None:
        write_csv(out, columns, rows)
    if settings.json:
        console.out(to_json(records), highlight=False)
    else:
        shown = (lambda value: f"{value:.4g}") if console.is_terminal else str  # all digits for other programs
        cells = [[name, *map(shown, values)] for name, values in zip(results.names, results.values, strict=True)]
        show_table(console, columns, cells)
    report(results, "above")
