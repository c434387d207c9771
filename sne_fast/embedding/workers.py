"""What a process does that encodes units for another one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..nn.encoder import SNE
from ..nn.predictor import Predictor, load_encoder
from ..version import __version__
from .dataset import MODEL, EmbeddingDataset
from .units import Unit, embed_unit

__all__ = ["Job", "encode", "job_of"]

_loaded: dict[tuple[str, str], SNE | Predictor] = {}


@dataclass(frozen=True)
class Job:
    """What is the same for all units of a dataset; it goes to each process once.

    Attributes:
        hash: of the encoder and the options.
        files: of the folder of the encoder, so that processes need not see that folder.
        options: of `embed_unit`.
        device: of the encoder.
        version: of this package; vectors of others may differ.
    """

    hash: str
    files: dict[str, bytes]
    options: dict[str, Any]
    device: str
    version: str = __version__


def job_of(dataset: EmbeddingDataset, device: str, max_memory: float | None) -> Job:
    """Return the job of a dataset."""
    files = {file.name: file.read_bytes() for file in sorted((dataset.path / MODEL).iterdir()) if file.is_file()}
    return Job(dataset.hash, files, {**dataset.options, "max_memory": max_memory}, device)


def encode(job: Job, unit: Unit, **options: Any) -> Any:
    """Encode a unit with the encoder of a job, which this process loads once.

    Raises:
        ValueError: the job comes from another version of this package.
    """
    if job.version != __version__:
        raise ValueError(f"this process has sne_fast {__version__}, and the work comes from {job.version}")
    place = (job.hash, job.device)
    if place not in _loaded:
        _loaded.clear()  # of a job before
        with tempfile.TemporaryDirectory() as folder:
            for name, content in job.files.items():
                Path(folder, name).write_bytes(content)
            _loaded[place] = load_encoder(folder, device=job.device)
    return embed_unit(_loaded[place], unit, **{**job.options, **options})
