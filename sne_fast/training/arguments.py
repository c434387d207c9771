"""Checks of the arguments of `fit`, which name the argument before any work is done."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..nn.predictor import Predictor
from .settings import FitSettings

CUT = ("chunk_size", "chunking", "scale", "order")
"""How a batch is packed, where batch and encoder both say it."""


def check_predictor(predictor: Any) -> Predictor:
    """Return the predictor, if it can be trained.

    Raises:
        TypeError: it is no predictor.
        ValueError: its parameters lie on several devices or on "meta", none of them is trained, or gradients are
            off for good.
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(f"fit: predictor must be a sne_fast.Predictor, got {_kind(predictor)}")
    parameters = dict(predictor.named_parameters())
    devices = sorted({str(t.device) for t in (*parameters.values(), *predictor.buffers())})
    if len(devices) != 1 or devices == ["meta"]:
        raise ValueError(f"fit: predictor must lie on one device, got {', '.join(devices)}; use predictor.to(device)")
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError("fit: predictor must have a parameter that requires a gradient, all are frozen")
    if torch.is_inference_mode_enabled():
        raise ValueError("fit: cannot train under torch.inference_mode, where there are no gradients; call it outside")
    return predictor


def check_settings(settings: Any, caller: str = "fit") -> FitSettings:
    """Return the settings, those of `FitSettings()` for None.

    Raises:
        TypeError: they are no `FitSettings`.
    """
    if settings is None:
        return FitSettings()
    if not isinstance(settings, FitSettings):
        example = f"; {settings} epochs are FitSettings(epochs={settings})" if type(settings) is int else ""
        raise TypeError(f"{caller}: settings must be a FitSettings, got {_kind(settings)}{example}")
    return settings


def check_limit(value: Any, what: str) -> int:
    """Return a largest number of weights.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an integer, got {_kind(value)}")
    if operator.index(value) < 1:
        raise ValueError(f"{what} must be at least 1, got {value}")
    return operator.index(value)


def check_packed(batch: Any, predictor: Predictor, what: str) -> WeightBatch:
    """Return the networks, if they are packed for the predictor.

    Args:
        what: the subject of the error's sentence, such as "fit: batch".

    Raises:
        TypeError: they are no `WeightBatch`.
        ValueError: they are packed otherwise than the encoder asks for.
    """
    if not isinstance(batch, WeightBatch):
        raise TypeError(f"{what} must be a WeightBatch, got {_kind(batch)}; use predictor.pack(networks)")
    config = predictor.config["encoder"]
    for name in CUT:
        want, got = config.get(name), getattr(batch, name, None)
        if want is not None and got is not None and want != got:
            raise ValueError(
                f"{what} must be packed with {name} {want!r} as the predictor's encoder was made, got {got!r}; "
                "use predictor.pack(networks)"
            )
    return batch


def check_batch(batch: Any, predictor: Predictor, what: str = "batch") -> WeightBatch:
    """Return the networks to learn from, detached from the parameters they were packed from and prepared.

    Raises:
        TypeError: as `check_packed`.
        ValueError: as `check_packed`, they were packed under `torch.inference_mode`, or they cannot be prepared as the
            predictor asks for.
    """
    found = check_packed(batch, predictor, f"fit: {what}")
    if found.values.is_inference():
        raise ValueError(
            f"fit: {what} was packed under torch.inference_mode, of which no training can use tensors; pack it under "
            "torch.no_grad"
        )
    return predictor.prepare(found.detach())


def check_targets(targets: Any, predictor: Predictor, networks: int, what: str = "targets") -> Tensor:
    """Return targets as a tensor `(networks, out_features)`, or `(networks,)` integers for classes.

    Arrays and sequences of numbers become tensors; `(networks,)` numbers are targets of a single output.

    Raises:
        TypeError: they are no numbers.
        ValueError: not one row per network, or what `Predictor.set_targets` refuses.
    """
    values = _tensor(targets, what)
    if values.ndim == 0 or len(values) != networks or not networks:
        got = len(values) if values.ndim else "a single number"
        raise ValueError(f"fit: {what} must have one row per network ({networks}), got {got}")
    if predictor.loss == "cross_entropy":
        if not values.dtype.is_floating_point and values.dtype != torch.bool:
            values = values.long()
    else:
        if values.ndim == 1 and predictor.out_features == 1:
            values = values[:, None]
        if not values.dtype.is_floating_point:
            values = values.to(torch.get_default_dtype())
    try:
        predictor.normalise(values)  # raises for what the loss does not take
    except ValueError as error:
        raise ValueError(f"fit: {what} do not fit the predictor: {error}") from error
    return values


def check_validation(validation: Any, predictor: Predictor) -> tuple[WeightBatch, Tensor] | None:
    """Return the validation networks and their targets.

    Raises:
        TypeError: it is no pair of a `WeightBatch` and targets, and was no stream.
        ValueError: as `check_batch` and `check_targets`.
    """
    if validation is None:
        return None
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        size = f" of {len(validation)}" if isinstance(validation, tuple | list) else ""
        raise TypeError(
            f"fit: validation must be a pair (batch, targets) or a NetworkStream, got {_kind(validation)}{size}"
        )
    batch = check_batch(validation[0], predictor, "validation networks")
    return batch, check_targets(validation[1], predictor, len(batch), "validation targets")


def check_calls(settings: FitSettings, augment: Any, log: Any, **callbacks: Any) -> None:
    """Check what `fit` calls.

    Raises:
        TypeError: something that cannot be called, or a log that cannot resume.
        ValueError: an invariance loss without augmentation.
    """
    for name, value in {"augment": augment, "log": log, **callbacks}.items():
        if value is not None and not callable(value):
            raise TypeError(f"fit: {name} must be callable, got {_kind(value)}")
    if log is not None and not callable(getattr(log, "resume", None)):
        raise TypeError(f"fit: log must have a method resume(epochs), as CsvLog has, got {_kind(log)}")
    if settings.invariance and augment is None:
        raise ValueError("fit: settings.invariance compares a batch with its augmented copy; give augment")


def check_checkpoint(checkpoint: Any) -> Path | None:
    """Return the path of the checkpoint.

    Raises:
        TypeError: it is no path.
        IsADirectoryError: it is a folder.
    """
    if checkpoint is None:
        return None
    if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
        raise TypeError(f"fit: checkpoint must be the path of a file, got {checkpoint!r:.80}")
    path = Path(os.fsdecode(checkpoint))
    if path.is_dir():
        raise IsADirectoryError(f"fit: checkpoint {str(path)!r} is a folder; give a file in it, such as fit.pt")
    return path


def check_seconds(value: Any) -> float:
    """Return the seconds between two writes of the checkpoint.

    Raises:
        TypeError: they are no number.
        ValueError: they are below 0, or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"fit: checkpoint_seconds must be a number, got {_kind(value)}")
    if not value >= 0:
        raise ValueError(f"fit: checkpoint_seconds must be at least 0, got {value}")
    return float(value)


def _tensor(values: Any, what: str) -> Tensor:
    if not isinstance(values, Tensor | np.ndarray | Sequence) and hasattr(values, "__array__"):
        values = np.asarray(values)  # a column of a table
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        values = list(values)
        if values and all(isinstance(value, Tensor) for value in values):
            values = torch.stack(values) if len({value.shape for value in values}) == 1 else values
    try:
        found = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
        if not isinstance(values, Tensor | np.ndarray) and found.dtype == torch.float64:
            found = found.to(torch.get_default_dtype())  # Python's numbers, as torch.tensor takes them
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"fit: {what} must be a tensor, an array or a list of numbers, got {_kind(values)}") from error
    if found.is_complex() or found.layout != torch.strided or found.device.type == "meta":
        raise TypeError(f"fit: {what} must be real numbers in memory, got {found.dtype} on {found.device}")
    return found.detach()


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.40}"
    return type(value).__name__
