"""Sketches: a few numbers of every tensor of a network, read once, from which distances of weights are known.

For a tensor of n weights w in the order in which they are stored, with random signs s that depend on n alone:

- sketch: `sum_i s_i w_i` over the i of the same remainder by 128, `(128,)`. It is linear, and the squared distance of
  two sketches is that of the tensors in the mean, with a relative standard deviation of `sqrt(2 / 128)` = 0.125;
- sample: up to 256 weights at places that depend on n alone;
- digest: of the values and the shape;
- unordered digest: a sum over the values that does not depend on their order, so that permuted units do not change it;
- square sum, kurtosis, share of zeros, and share of different absolute values among up to 4,096 of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ..data.layer_stream import LayerStream

SKETCH = 128
"""Numbers of the sketch of a tensor."""
SAMPLE = 256
"""Weights of a tensor that are kept as they are."""
_BLOCK = 1 << 20
_SAMPLED = 4096


@dataclass(frozen=True, eq=False)
class TensorSketch:
    """What is kept of a tensor, see the module.

    Attributes:
        shape: of the tensor.
        digest: 16 hexadecimal digits.
        unordered: the digest that does not depend on the order of the values.
        values: `(128,)` float64.
        sample: `(256,)` float32 or fewer.
        squares: sum of the squared weights.
        kurtosis: of the weights, 3 for Gaussian ones; 0 for a constant tensor.
        zeros: share of weights that are zero.
        levels: share of different absolute values among the weights that are not zero, of up to 4,096 of them.
    """

    shape: tuple[int, ...]
    digest: str
    unordered: str
    values: np.ndarray
    sample: np.ndarray
    squares: float
    kurtosis: float
    zeros: float
    levels: float

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_matrix(self) -> bool:
        """True for tensors of two and more dimensions; vectors of many networks are alike without being related."""
        return len(self.shape) >= 2


@dataclass(frozen=True, eq=False)
class NetworkSketch:
    """The sketches of the tensors of a network, in order and by name.

    Attributes:
        name: of the network.
        layers: names of its layers, each with the names of its tensors.
        tensors: the sketch of every tensor.
    """

    name: str
    layers: tuple[tuple[str, tuple[str, ...]], ...]
    tensors: dict[str, TensorSketch]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(t.size for t in self.tensors.values())

    @property
    def compared(self) -> dict[str, TensorSketch]:
        """The tensors that tell networks apart: matrices, or all of a network without any."""
        return {name: t for name, t in self.tensors.items() if t.is_matrix} or self.tensors

    def _mean(self, of: str) -> float:
        tensors = self.compared.values()
        return sum(getattr(t, of) * t.size for t in tensors) / max(1, sum(t.size for t in tensors))

    @property
    def zeros(self) -> float:
        """Share of zeros among the compared weights."""
        return self._mean("zeros")

    @property
    def levels(self) -> float:
        """Share of different absolute values among the compared weights, low for rounded ones."""
        return self._mean("levels")

    @property
    def kurtosis(self) -> float:
        """Mean kurtosis of the compared tensors by their weights."""
        return self._mean("kurtosis")

    @property
    def norm(self) -> float:
        """Euclidean norm of the compared weights."""
        return float(np.sqrt(sum(t.squares for t in self.compared.values())))


def sketch(network: Any, *, name: str | None = None, key: str | None = None) -> NetworkSketch:
    """Read a network once, layer by layer, and return its sketch.

    Args:
        network: a path, module or state_dict, as :func:`sne_fast.pack` takes it.
        name: of the network; by default its path, or as `pack` names it.
        key: the place of the weights in a file that holds several.

    Raises:
        ValueError: what cannot be read; the message names it.

    Example:
        >>> net = torch.nn.Linear(4, 3)
        >>> found = sketch(net)
        >>> found.weights, sorted(found.tensors)
        (15, ['bias', 'weight'])
    """
    stream = LayerStream(network, key=key, nonfinite="keep")
    layers, tensors = [], {}
    for i in range(len(stream)):
        layer = stream.read(i)
        layers.append((layer.name, tuple(own for own, _ in layer.tensors)))
        tensors.update({own: _tensor_sketch(tensor) for own, tensor in layer.tensors})
    return NetworkSketch(name or stream.network.name or "", tuple(layers), tensors)


def _tensor_sketch(tensor: Tensor) -> TensorSketch:
    flat = tensor.detach().float().cpu().contiguous().numpy().reshape(-1)
    flat = flat + np.float32(0)  # -0 becomes 0
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}".encode(), digest_size=8)
    unordered = 0
    sums = np.zeros(SKETCH)
    moments = np.zeros(4)
    with np.errstate(all="ignore"):  # NaN and infinities give NaN, and are near nothing
        mean = float(flat.mean(dtype=np.float64)) if flat.size else 0.0
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK]
            digest.update(part.tobytes())
            unordered = (unordered + _mixed_sum(part)) % 2**64
            wide = part.astype(np.float64)
            signed = wide * _signs(flat.size, start, len(part))
            sums += np.pad(signed, (0, -len(signed) % SKETCH)).reshape(-1, SKETCH).sum(0)
            centred = (wide - mean) ** 2
            moments += [(wide**2).sum(), centred.sum(), (centred**2).sum(), (part == 0).sum()]
    squares, second, fourth, zeros = moments.tolist()
    kurtosis = fourth * flat.size / second**2 if second > 0 else 0.0
    some = np.abs(flat[:: max(1, flat.size // _SAMPLED)][:_SAMPLED])
    some = some[some != 0]
    return TensorSketch(
        tuple(tensor.shape),
        digest.hexdigest(),
        f"{unordered:016x}",
        sums,
        flat[np.linspace(0, flat.size - 1, min(flat.size, SAMPLE)).astype(np.int64)].copy(),
        squares,
        kurtosis,
        zeros / max(1, flat.size),
        len(np.unique(some)) / len(some) if len(some) else 1.0,
    )


@lru_cache(maxsize=64)
def _signs(size: int, start: int, length: int) -> np.ndarray:
    """Return random signs `(length,)` of the weights from `start` on of a tensor of `size` weights."""
    bits = np.unpackbits(np.frombuffer(np.random.default_rng([size, start]).bytes((length + 7) // 8), np.uint8))
    return 1 - 2 * bits[:length].astype(np.int8)


def _mixed_sum(values: np.ndarray) -> int:
    """Return a sum over values that two different sets of values hardly share, by the finaliser of splitmix64."""
    x = values.view(np.uint32).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))
