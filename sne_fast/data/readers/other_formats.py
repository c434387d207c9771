"""Readers of formats from outside PyTorch, by the format of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from .contents import Contents
from .flax_files import read_flax
from .gguf_files import read_gguf
from .keras_files import read_hdf5, read_keras
from .numpy_files import read_npy_files, read_npz
from .onnx_files import read_onnx
from .tflite_files import read_tflite

__all__ = ["OTHER_FORMATS"]

OTHER_FORMATS: Mapping[str, Callable[[Path], Contents]] = {
    "npz": read_npz,
    "npy": read_npy_files,
    "gguf": read_gguf,
    "onnx": read_onnx,
    "hdf5": read_hdf5,
    "keras": read_keras,
    "flax": read_flax,
    "tflite": read_tflite,
}
