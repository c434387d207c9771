"""A network that is read and packed layer by layer, so that only a layer or two are in memory at once."""

from __future__ import annotations

import copy
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .adapters import Adapters
from .batch import WeightBatch
from .checkpoints import Checkpoint, CheckpointError, OpenCheckpoint, open_checkpoint
from .choices import Chunking, NonFinite
from .cutting import cut_of, has_kernel
from .known_names import buffer_by_name
from .layer_overrides import given_kinds
from .layers import Layer, Network, collect
from .packing import check_options, pack_collected
from .readers.lazy_tensors import LazyTensor
from .readers.quantisation_configs import NOTHING_SAID
from .remote.paths import is_remote
from .weight_entries import weight_of

__all__ = ["LayerStream"]

_REMOTE_THREADS = 8  # that read layers of a network in a store elsewhere
_BYTES_AHEAD = 2**26


class LayerStream:
    """The layers of one network, of which nothing but names, shapes and dtypes is read before they are asked for.

    Formats that cannot be read tensor by tensor, and modules and state_dicts, are in memory as they are.

    Args:
        source: a path or URL as `load_state_dict` takes it, an opened or read checkpoint, a module or a state_dict.
        key: the place of the weights in a pickled file that has several.
        order: of the layers, as in :func:`sne_fast.pack`.
        kinds: of layers, "names" or a mapping, as in :func:`sne_fast.pack`.
        nonfinite: what NaN and infinities do, as in :func:`sne_fast.pack`.
        index: position of the network among several, for messages.

    Attributes:
        network: name, layers in order, and what is left out; tensors that are not in memory are on the meta device.

    Raises:
        ValueError, TypeError: as :func:`sne_fast.pack`, as far as it does not depend on values.
    """

    def __init__(
        self,
        source: Any,
        *,
        key: str | None = None,
        order: str = "names",
        kinds: Literal["names"] | Mapping[str, Any] | None = None,
        nonfinite: NonFinite = "raise",
        index: int = 0,
    ) -> None:
        self.nonfinite = nonfinite
        self.first = 0
        self._lazy: dict[int, LazyTensor] = {}  # by the id of the meta tensor that stands for it
        self._threads = 1
        name = None
        if isinstance(source, (str, os.PathLike)):
            name = os.fsdecode(source)
            self._threads = _REMOTE_THREADS if is_remote(name) else 1
            try:
                source = open_checkpoint(source, key)
            except CheckpointError as error:
                raise CheckpointError(f"pack: network {index}: {error}") from error
        elif key is not None:
            raise CheckpointError("key= is for files of torch, not for a network that is in memory")
        given = source
        self._quantisation = getattr(source, "quantisation", NOTHING_SAID)
        if isinstance(source, OpenCheckpoint):
            given = Checkpoint(**{**vars(source), "tensors": self._stand_ins(source)})
        by_names = isinstance(kinds, str) and kinds == "names"
        self.order = order
        self.network: Network = collect(index, given, order, kinds_by_names=by_names, values=False)
        if name is not None:
            self.network.name = name
        self._kinds = given_kinds([self.network], None if by_names else kinds)[0]

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.network.layers)

    def __getitem__(self, run: slice) -> LayerStream:
        """Return the stream of a run of layers, which keep their levels.

        Raises:
            ValueError: anything else than a slice of step 1, or one without layers.
        """
        start, stop, step = run.indices(len(self)) if isinstance(run, slice) else (0, 0, 1)
        if step != 1 or stop <= start:
            raise ValueError(f"LayerStream: layers must be a slice of step 1 with at least one layer, got {run!r}")
        part = copy.copy(self)
        part.network = replace(self.network, layers=self.network.layers[start:stop])
        part.first = self.first + start
        part._kinds = {i - start: kind for i, kind in self._kinds.items() if start <= i < stop}
        return part

    def stored_bytes(self) -> list[int]:
        """Return the bytes that reading each layer takes."""
        return [
            sum(_bytes(part) for name, _ in layer.tensors for part in self._sources(name).values())
            for layer in self.network.layers
        ]

    def tensor_sizes(self) -> list[list[int]]:
        """Return the weights of each tensor of each layer; of quantised ones an upper bound, by their bytes."""
        return [[self._size(name, tensor) for name, tensor in layer.tensors] for layer in self.network.layers]

    def chunk_counts(self, chunk_size: int, chunking: Chunking) -> list[list[int]]:
        """Return the chunks of each tensor of each layer; of quantised ones about as many as there are at most."""
        found = []
        for i, (layer, sizes) in enumerate(zip(self.network.layers, self.tensor_sizes(), strict=True)):
            counts = []
            for (_, tensor), size, kind in zip(layer.tensors, sizes, layer.types(self._kinds.get(i)), strict=True):
                shape = tuple(tensor.shape)
                known = size == math.prod(shape)
                rows = cut_of(shape, has_kernel(kind, len(shape)), chunking).rows if known else 1
                counts.append(rows * -(-(size // rows) // chunk_size))
            found.append(counts)
        return found

    @property
    def num_weights(self) -> int:
        """Number of weights, see `tensor_sizes`."""
        return sum(map(sum, self.tensor_sizes()))

    def batches(self, *, ahead: bool = True, **options: Any) -> Iterator[WeightBatch]:
        """Yield each layer as a batch of one network, with its level in the whole.

        Args:
            ahead: whether a thread reads the next layer while the caller works on this one; of a network in a store
                elsewhere, eight threads read as many layers as have 64 MiB together, at least one.
            options: the arguments of :func:`sne_fast.pack` besides those that the stream has, and levels.

        Raises:
            ValueError: as :func:`sne_fast.pack`.
        """
        sizes = self.stored_bytes()
        with ThreadPoolExecutor(self._threads) as pool:
            waiting: deque[Future[Layer]] = deque()
            try:
                for i in range(len(self)):
                    layer = waiting.popleft().result() if waiting else self.read(i)
                    while ahead and self._may_read(i, len(waiting), sizes):
                        waiting.append(pool.submit(self.read, i + 1 + len(waiting)))
                    batch = self._pack(i, layer, **options)
                    del layer
                    yield batch
                    del batch
            finally:
                for future in waiting:
                    future.cancel()

    def _may_read(self, i: int, waiting: int, sizes: list[int]) -> bool:
        """Return whether one more layer may be read while layer i is worked on and others are waiting."""
        following = i + 1 + waiting
        if following >= len(self) or waiting >= self._threads:
            return False
        return waiting == 0 or sum(sizes[i + 1 : following + 1]) <= _BYTES_AHEAD

    def read(self, i: int) -> Layer:
        """Read layer i into memory.

        Raises:
            CheckpointError: the file changed or is damaged.
            ValueError: a quantised weight that cannot be decoded.
        """
        layer = self.network.layers[i]
        tensors = [(name, self._read(name, tensor)) for name, tensor in layer.tensors]
        held = {**layer.held, **{own: tuple(t.shape) for own, (_, t) in zip(layer.own, tensors, strict=True)}}
        return replace(layer, tensors=tensors, held=held)

    def _read(self, name: str, tensor: Tensor) -> Tensor:
        stored_as, _ = self.network.sources[name]
        sources = self._sources(name)
        if all(id(part) not in self._lazy for part in sources.values()):
            return tensor
        values = {part: self._lazy[id(t)].read() if id(t) in self._lazy else t for part, t in sources.items()}
        return weight_of(stored_as, values, self.network.label, self._quantisation)

    def _sources(self, name: str) -> dict[str, Tensor]:
        return self.network.sources[name][1]

    def _size(self, name: str, tensor: Tensor) -> int:
        sources = self._sources(name)
        if tensor.dtype.is_floating_point and len(sources) < 2:
            return tensor.numel()
        # Quantised weights have two bits at the least, most have four or more.
        return 4 * max((_bytes(part) for part in sources.values()), default=_bytes(tensor))

    def _pack(self, i: int, layer: Layer, **options: Any) -> WeightBatch:
        chosen = {"chunk_size": 32, "chunking": "flat", "scale": "tensor", "nonfinite": self.nonfinite, **options}
        chosen["dtype"] = chosen.get("dtype") or torch.get_default_dtype()
        device = chosen.get("device")
        chosen["device"] = None if device is None else torch.device(device)
        chosen["order"] = self.order
        check_options(*(chosen[name] for name in ("chunk_size", "chunking", "scale", "order", "nonfinite")))
        if chosen["device"] is not None:  # the bytes as they are stored; they are cut there
            layer = replace(layer, tensors=[(name, t.to(chosen["device"])) for name, t in layer.tensors])
        network = Network(self.network.index, self.network.name, [layer])
        return pack_collected([network], layer.types(self._kinds.get(i)), [self.first + i], **chosen)

    def _stand_ins(self, checkpoint: OpenCheckpoint) -> dict[str, Tensor]:
        """Return tensors in memory, and tensors without values for those that are to be read."""
        made: dict[Any, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, tensor in checkpoint.tensors.items():
            if isinstance(tensor, Tensor):
                found[name] = tensor
                continue
            if tensor.identity not in made:
                made[tensor.identity] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                self._lazy[id(made[tensor.identity])] = tensor
            found[name] = made[tensor.identity]
        # Names under which buffers are known in some networks and weights in others: their values decide. The canonical
        # form of an adapter takes all of its tensors, which are small.
        adapters = Adapters(found)
        for name, tensor in list(found.items()):
            lazy = tensor.is_meta and id(tensor) in self._lazy
            buffer = lazy and tensor.is_floating_point() and tensor.numel() and buffer_by_name(name, tensor, found)
            if lazy and (buffer or name in adapters.names):
                read = self._lazy[id(tensor)].read()
                found.update({other: read for other, same in found.items() if same is tensor})
        self._kept = list(made.values())  # whose ids are keys
        return found


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
