"""Encoding of networks in parts: layer by layer, joined at the end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.choices import NonFinite
from ..data.layer_stream import LayerStream
from ..data.layers_apart import layer_names, layers_apart
from ..data.networks import Networks
from ..failures import any_sentence
from ..free_memory import MemoryNeeded, available_bytes
from .chunk_samples import sample_chunks
from .config_checks import choice, flag, integer, shown
from .layer_encodings import LayerEncodings
from .many_networks import PACKED_WEIGHTS, are_several, groups_of, packed_ahead
from .memory_needs import attention_seconds, describe, memory_needed

SLOW = 60.0
"""Seconds of quadratic attention from which `encode` warns."""
_SHOWN = 5
"""Failures in a warning."""


class LayeredEncodingMixin:
    """What an encoder offers besides calling it: layers apart, and networks that do not fit into memory.

    A class that has it offers `folded_weights`, `encode_batch_layers`, `join_layers`, `check_batch`, `pack` and
    `pack_options`.
    """

    __call__: Callable[..., Tensor]
    hidden_dim: int
    out_features: Any
    tensor_statistics: Any
    sample_parameter: Any
    config: Any
    pack: Any
    pack_options: Any
    check_batch: Any
    encode_batch_layers: Any
    folded_weights: Any
    join_layers: Any

    @torch.no_grad()
    def encode(
        self,
        source: Any,
        *,
        key: str | None = None,
        kinds: Literal["names"] | Mapping[str, Any] | None = None,
        nonfinite: NonFinite = "raise",
        max_chunks: int | None = None,
        seed: int = 0,
        max_memory: float | None = None,
        batch_weights: int = PACKED_WEIGHTS,
        workers: int = 1,
        normalise: bool = False,
        on_error: Literal["raise", "record"] = "raise",
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Encode one network of any size in bounded memory, or many, without gradients.

        A large checkpoint is opened by its headers; then a layer is read, packed, encoded and dropped while the next
        one is read. What is needed at once is known before any work: about 15 bytes per weight of the largest layer
        with ``set_attention="isab"``. Small ones of many are packed and encoded together, while threads read the next.
        Vectors are those of :meth:`forward` up to rounding.

        Args:
            source: a path or URL (see :func:`sne_fast.data.checkpoints.load_state_dict`), a module, a state_dict, a
                checkpoint that was opened or read, or a :class:`sne_fast.data.layer_stream.LayerStream`; or an iterable
                of these, such as a list, a generator or a :class:`sne_fast.zoo.Zoo`, which is read as it is encoded.
            key: the place of the weights in a pickled file that has several.
            kinds: as in :func:`sne_fast.pack`.
            nonfinite: as in :func:`sne_fast.pack`.
            max_chunks: as in :meth:`encode_layers`: then z is an estimate, whose error :meth:`spread` tells.
            seed: of the sample.
            max_memory: bytes that may be used; None is what is free.
            batch_weights: of many, the most weights that are packed and encoded together. Larger networks, and those
                whose size is not known before they are read, are encoded layer by layer.
            workers: of many, threads that read and pack ahead, each ``batch_weights`` weights.
            normalise: divide each vector by its Euclidean norm.
            on_error: of many, "raise" the first error, or "record" networks that fail as rows of NaN and go on.
            progress: function that is called with the share of the work done, in [0, 1]; of an iterable without a
                length, at the end.

        Returns:
            z ``(out_features,)``, of an iterable of B networks ``(B, out_features)`` in its order.

        Raises:
            MemoryNeeded: more memory is needed than may be used (a MemoryError); the message says what would help.
            ValueError, TypeError: as :func:`sne_fast.pack`; an argument that a :class:`LayerStream` has itself.

        Warns:
            UserWarning: networks that failed, with the reasons, where ``on_error`` is "record".

        Example::

            >>> encoder = sne_fast.SNE(hidden_dim=32, set_attention="isab")
            >>> encoder.encode(torch.nn.Linear(4, 3)).shape
            torch.Size([32])
            >>> encoder.encode((torch.nn.Linear(4, n) for n in range(1, 6)), normalise=True).shape
            torch.Size([5, 32])
        """
        most = integer("SNE.encode", "batch_weights", batch_weights)
        workers = integer("SNE.encode", "workers", workers)
        choice("SNE.encode", "on_error", on_error, ("raise", "record"))
        flag("SNE.encode", "normalise", normalise)

        def alone(place: int, one: Any, on_share: Callable[[float], None] | None) -> Tensor:
            stream = one
            if not isinstance(stream, LayerStream):
                stream = LayerStream(
                    one, key=key, order=self.config["order"], kinds=kinds, nonfinite=nonfinite, index=place
                )
            elif key is not None or kinds is not None or nonfinite not in ("raise", stream.nonfinite):
                raise ValueError(
                    "SNE.encode: key=, kinds= and nonfinite= are those of the LayerStream; give them to it"
                )
            self.check_stream(stream, max_chunks=max_chunks, max_memory=max_memory)
            return self.join(self.encode_layers(stream, max_chunks=max_chunks, seed=seed, progress=on_share))[0]

        if not are_several(source):
            z = alone(0, source, progress)
            return F.normalize(z, dim=0) if normalise else z

        whole = max_chunks is None and max_memory is None and key is None and (kinds is None or kinds == "names")
        groups = groups_of(source, most) if whole else ([numbered] for numbered in enumerate(source))

        def pack(group: list[tuple[int, Any]]) -> WeightBatch | None:
            if len(group) == 1:
                return None
            found: WeightBatch = self.pack([one for _, one in group], nonfinite=nonfinite, kinds=kinds)
            return found

        count = len(source) if isinstance(source, Sized) else None
        rows: dict[int, Tensor] = {}
        failures: dict[int, str] = {}

        def share_done(share: float) -> None:
            if progress is not None and count:
                progress((len(rows) + len(failures) + share) / count)

        for group, packed in packed_ahead(groups, pack, workers):
            if isinstance(packed, WeightBatch):
                rows.update(zip((place for place, _ in group), self(packed), strict=True))
            else:  # also to learn which network of a group cannot be packed
                for place, one in group:
                    try:
                        rows[place] = alone(place, one, share_done)
                    except Exception as error:
                        if on_error == "raise":
                            raise
                        failures[place] = any_sentence(error)
            share_done(0.0)
        if not rows and not failures:
            raise ValueError("SNE.encode: source must hold at least one network, got an empty sequence")
        if progress is not None and not count:
            progress(1.0)
        if failures:
            reasons = "; ".join(list(failures.values())[:_SHOWN])  # each names its network
            more = f"; and {len(failures) - _SHOWN} more" if len(failures) > _SHOWN else ""
            total = len(rows) + len(failures)
            warnings.warn(f"SNE.encode: {len(failures)} of {total} networks failed ({reasons}{more})", stacklevel=3)
        missing = self.sample_parameter.new_full((self.out_features,), math.nan)
        z = torch.stack([rows.get(place, missing) for place in range(len(rows) + len(failures))])
        return F.normalize(z, dim=1) if normalise else z

    def check_stream(
        self, stream: LayerStream, *, max_chunks: int | None = None, max_memory: float | None = None
    ) -> float:
        """Check that a network can be encoded layer by layer, by the sizes of its tensors alone.

        Args:
            stream: the network.
            max_chunks: as in :meth:`encode`.
            max_memory: as in :meth:`encode`.

        Returns:
            The bytes that are needed besides those in use.

        Raises:
            MemoryNeeded: these are more than may be used.
            ValueError: ``max_chunks`` below 2, or a ``max_memory`` that is no number above 0.

        Warns:
            UserWarning: attention that is quadratic in the chunks of a tensor will take more than a minute.
        """
        max_chunks = _checked(max_chunks)
        if max_memory is not None and not (isinstance(max_memory, Real) and max_memory > 0):
            raise ValueError(f"SNE: max_memory must be a number of bytes above 0, got {shown(max_memory)}")
        need = memory_needed(stream, self.config, max_chunks, self.sample_parameter.dtype.itemsize)
        allowed = available_bytes() if max_memory is None else float(max_memory)
        if need.total > allowed:
            raise MemoryNeeded(describe(stream.network.label, need, allowed, self.config, max_chunks))
        seconds = 0.0 if self.config["set_attention"] == "isab" else attention_seconds(stream, self.config, max_chunks)
        if seconds > SLOW:
            warnings.warn(
                f"SNE: set_attention='sab' is quadratic in the chunks of a tensor, about {_duration(seconds)} on one "
                f"core for {stream.network.label}; 'isab' is linear, and max_chunks= encodes a sample",
                stacklevel=3,
            )
        return need.total

    def encode_layers(
        self,
        networks: WeightBatch | Networks | LayerStream,
        *,
        max_chunks: int | None = None,
        seed: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> LayerEncodings:
        """Encode every layer by stages 1 to 3, for :meth:`join` to make the vectors of networks of.

        Layers are encoded one after another, so the encoding of a layer has the same bits whichever others are in the
        batch, and what is in memory at once is bounded by the largest layer where no gradient is wanted.

        Args:
            networks: a batch, networks, which are packed first, or a stream, of which a layer is read, packed, encoded
                and dropped before the next one.
            max_chunks: the most chunks of a tensor that are encoded; None is all. A tensor that has more is sampled:
                its chunks are cut into ``max_chunks`` runs of equal length, and one is drawn from each. Its scale and
                its statistics stay those of all its weights.
            seed: of the sample, at least 0.
            progress: function that is called with the share of the weights done, in [0, 1].

        Returns:
            The layers in the order of the batch, on its device.

        Raises:
            ValueError: as :meth:`forward`, and ``max_chunks`` below 2.
        """
        max_chunks = _checked(max_chunks)
        seed = integer("SNE", "seed", seed, low=0)
        parts: list[LayerEncodings] = []
        names: tuple[str, ...] = ()
        weights = self.folded_weights()
        for layer, share in self._layers_of(networks):
            self.check_batch(layer)
            if self.tensor_statistics is not None:
                self.tensor_statistics.columns_of(layer)  # before a sample, which keeps them
            sample = None if max_chunks is None else sample_chunks(layer, max_chunks, seed)
            parts.append(self.encode_batch_layers(layer, sample, weights))
            names += layer_names(layer)
            if progress is not None:
                progress(share)
            del layer, sample  # before the next one is packed
        return replace(LayerEncodings.cat(parts), names=names)

    def _layers_of(self, networks: WeightBatch | Networks | LayerStream) -> Iterator[tuple[WeightBatch, float]]:
        """Yield batches of one layer, each with the share of all weights that it completes."""
        if isinstance(networks, LayerStream):
            sizes = [sum(layer) for layer in networks.tensor_sizes()]
            options = {name: value for name, value in self.pack_options.items() if name != "order"}
            layers = networks.batches(**options)
        else:
            batch = networks if isinstance(networks, WeightBatch) else self.pack(networks)
            self.check_batch(batch)
            apart = layers_apart(batch)
            sizes = apart.network_sizes.tolist()
            layers = (apart[i] for i in range(len(apart))) if len(apart) else iter([apart])
        total, done = max(sum(sizes), 1), 0
        for size in sizes or [0]:
            done += size
            yield next(layers), done / total  # without a name, which would keep it

    def join(self, encodings: LayerEncodings, network_ptr: Tensor | Sequence[int] | None = None) -> Tensor:
        """Encode layers that were encoded apart to the vectors of their networks (stage 4).

        Args:
            encodings: layers, network after network; see :meth:`LayerEncodings.cat`.
            network_ptr: ``(B+1,)`` integers: network b has the layers ``network_ptr[b]:network_ptr[b+1]``, at least
                one. None takes all layers for one network.

        Returns:
            z ``(B, out_features)``.

        Raises:
            ValueError: encodings of an encoder of another width or dtype or without the statistics of this one, or
                pointers that do not cut them.
        """
        if encodings.vectors.shape[1] != self.hidden_dim or (encodings.pooled is None) != (
            self.tensor_statistics is None
        ):
            raise ValueError(
                f"SNE.join: encodings must be of an encoder of width {self.hidden_dim} "
                f"{'without' if self.tensor_statistics is None else 'with'} statistics, got width "
                f"{encodings.vectors.shape[1]} {'without' if encodings.pooled is None else 'with'} statistics"
            )
        dtype, want = encodings.vectors.dtype, self.sample_parameter.dtype
        if dtype != want and not torch.is_autocast_enabled(encodings.vectors.device.type):
            raise ValueError(
                f"SNE.join: encodings must be {want}, as the encoder is, got {dtype}; use encodings.to(device, dtype)"
            )
        z: Tensor = self.join_layers(encodings, *_network_pointers(network_ptr, encodings))
        return z

    def spread(self, encodings: LayerEncodings, network_ptr: Tensor | Sequence[int] | None = None) -> Tensor:
        """Estimate the relative standard error of z that leaving chunks out causes.

        Half the distance between the vectors by each half of the sample, over the size of z: if errors of the halves
        are independent and shrink with the root of their size, this is the size of the error of both together.

        Args:
            encodings: layers encoded with ``max_chunks``.
            network_ptr: as for :meth:`join`.

        Returns:
            ``(B,)``; zeros where no chunk was left out.
        """
        z = self.join(encodings, network_ptr)
        if encodings.halves is None:
            return z.new_zeros(z.shape[0])
        first, second = (self.join(replace(encodings, vectors=half), network_ptr) for half in encodings.halves)
        relative: Tensor = (first - second).norm(dim=1) / 2 / z.norm(dim=1).clamp_min(torch.finfo(z.dtype).tiny)
        return relative


def _network_pointers(given: Tensor | Sequence[int] | None, encodings: LayerEncodings) -> tuple[Tensor, Tensor]:
    """Return checked pointers of networks, on the device of the encodings and on the CPU."""
    layers = len(encodings)
    if given is None:
        given = [0, layers]
    try:
        host = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        host = torch.empty(0)
    whole = not (host.is_floating_point() or host.is_complex() or host.dtype == torch.bool)
    cuts = host.ndim == 1 and len(host) > 0 and whole
    if not cuts or int(host[0]) != 0 or int(host[-1]) != layers or bool((host.diff() < 1).any()):
        raise ValueError(
            f"SNE.join: network_ptr must be increasing integers from 0 to the number of layers, {layers}, got "
            f"{shown(given)}"
        )
    host = host.long()
    device = encodings.vectors.device
    return host if device.type == "cpu" else host.to(device), host


def _checked(max_chunks: int | None) -> int | None:
    return None if max_chunks is None else integer("SNE", "max_chunks", max_chunks, low=2)


def _duration(seconds: float) -> str:
    """Return seconds for a message, in the largest unit of which there are two or more."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
