"""`sne-fast demo`."""

from __future__ import annotations

from ..tasks.settings import DemoSettings
from .options import options_of


@options_of(DemoSettings)
def demo(settings: DemoSettings) -> None:
    """Train a zoo of digit classifiers, then a predictor of their accuracy from their weights.

    Writes the zoo (safetensors and a parquet index), the predictor, metrics.json, predictions.csv and two plots.
    """
    from ..tasks.demo import run

    run(settings.out, settings.demo)
