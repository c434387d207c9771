"""The encoder :class:`SNE`, made of the four stages of :mod:`sne_fast.nn.stages`."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..data.batch_checks import CHUNKINGS, NUM_TENSOR_TYPES, ORDERS, PACKED_BY, POINTERS, SCALES
from ..data.choices import Chunking, Order, Scale
from ..data.layers_apart import layers_apart
from ..data.networks import Networks
from ..data.packing import pack
from ..data.tensor_statistics import tensor_statistics
from ..ops import functional
from ..ops.pointer_facts import declare_lasting, derived, lengths, owners
from .bounded_memory import fits_at_once, network_runs
from .choices import SetAttention, Statistics
from .chunk_samples import ChunkSample
from .config_checks import choice, flag, integer, shown
from .layer_encodings import LayerEncodings
from .layered_encoding import LayeredEncodingMixin
from .plain_modules import is_plain
from .position_codes import position_code
from .pretrained import PretrainedMixin
from .stage_weights import StageWeights, fold_stages
from .stages import ChunkEncoder, NetworkEncoder, SetEncoder, TensorEncoder
from .statistics_channel import StatisticsChannel

MAX_CHUNK_SIZE = 2**16
"""Attention inside a chunk is quadratic in its size, and every forward pass makes a code for each place in a chunk."""
LASTING = (*POINTERS, *(f"{pointer}_host" for pointer in POINTERS), "layer_level", "chunk_positions")
"""Tensors of a batch from which tables are derived."""
STAGES: dict[str, type[nn.Module]] = {
    "chunk_encoder": ChunkEncoder, "tensor_encoder": TensorEncoder, "layer_encoder": SetEncoder,
    "network_encoder": NetworkEncoder,
}  # fmt: skip
SET_ATTENTIONS = get_args(SetAttention)
STATISTICS = get_args(Statistics)


def _given(weights: dict[str, StageWeights], stage: str) -> tuple[StageWeights, ...]:
    """Return the last argument of a stage, which one without weights, maybe a module of the user's, does not get."""
    return (weights[stage],) if stage in weights else ()


class SNE(LayeredEncodingMixin, PretrainedMixin, nn.Module):
    """Set-based Neural Network Encoder: one vector for the weights of any network (arXiv 2305.16625).

    Chunks of scalars are encoded and pooled to vectors (eq. 2-6), those to tensors (eq. 7), layers (appendix J) and the
    network (eq. 9), by set attention inside each set only. Networks of any mix of architectures share a batch, and
    nothing is padded. The ops run on the backend that :func:`sne_fast.use_backend` chooses.

    It starts with all biases and seeds at zero, type embedding and magnitude code normal(0, 1) and code gains of 0.1:
    with the modules' usual initialisation z hardly depends on the input.

    Args:
        hidden_dim: h, the width of every stage and of z.
        num_heads: H, a divisor of ``hidden_dim``.
        chunk_size: c, the largest number of scalars in a chunk, at most 65536.
        chunking: ``"flat"``, ``"neuron"`` or ``"kernel"``; see :func:`sne_fast.pack`.
        layer_norm: norms in every block; without them training is much harder, see the note above.
        scale: ``"tensor"`` divides each tensor by its root mean square when packing; ``"none"`` is the paper.
        element_order: add a code of the element's place to the elements of a chunk.
        chunk_order: add a code of the chunk's place to the chunks of a tensor.
        set_attention: ``"sab"``, quadratic in the chunks of a tensor, or ``"isab"``, linear, for stages 2 to 4.
        num_inducing: inducing points of ``"isab"``.
        order: ``"names"``, an order of layers that modules and all files share, or ``"definition"``, the paper's, which
            many files have lost; see :func:`sne_fast.pack`.
        statistics: what the encoder is told of each tensor besides its chunks: ``"none"``, the paper; ``"tensor"``, all
            of :func:`sne_fast.tensor_statistics`; ``"relative"``, those that do not name a size, for architectures that
            no training network has. z is then ``3 hidden_dim`` wide. See "The statistics channel" in `docs/method.md`.
        chunks: encode chunks (stages 1 and 2). False leaves them out and encodes statistics alone.

    Raises:
        ValueError: for an argument outside these.

    Example::

        >>> encoder = sne_fast.SNE(hidden_dim=32)
        >>> encoder([torch.nn.Linear(4, 3), torch.nn.Conv2d(1, 2, 3)]).shape
        torch.Size([2, 32])
    """

    __call__: Callable[..., Tensor]

    older_values: ClassVar = {"order": "definition", "statistics": "none", "chunks": True}

    def __init__(
        self,
        hidden_dim: int = 64,
        num_heads: int = 4,
        chunk_size: int = 32,
        chunking: Chunking = "flat",
        layer_norm: bool = True,
        scale: Scale = "tensor",
        element_order: bool = True,
        chunk_order: bool = True,
        set_attention: SetAttention = "sab",
        num_inducing: int = 32,
        order: Order = "names",
        statistics: Statistics = "none",
        chunks: bool = True,
    ) -> None:
        super().__init__()
        hidden_dim = integer("SNE", "hidden_dim", hidden_dim)
        num_heads = integer("SNE", "num_heads", num_heads)
        chunk_size = integer("SNE", "chunk_size", chunk_size, high=MAX_CHUNK_SIZE)
        num_inducing = integer("SNE", "num_inducing", num_inducing)
        if hidden_dim % num_heads:
            raise ValueError(f"SNE: num_heads must divide hidden_dim {hidden_dim}, got {num_heads}")
        choice("SNE", "chunking", chunking, CHUNKINGS)
        choice("SNE", "scale", scale, SCALES)
        choice("SNE", "set_attention", set_attention, SET_ATTENTIONS)
        choice("SNE", "order", order, ORDERS)
        choice("SNE", "statistics", statistics, STATISTICS)
        flag("SNE", "layer_norm", layer_norm)
        flag("SNE", "element_order", element_order)
        flag("SNE", "chunk_order", chunk_order)
        flag("SNE", "chunks", chunks)
        if not chunks and statistics == "none":
            raise ValueError("SNE: chunks=False leaves statistics alone; it needs statistics='tensor' or 'relative'")
        self._config: dict[str, Any] = {
            "hidden_dim": hidden_dim, "num_heads": num_heads, "chunk_size": chunk_size, "chunking": chunking,
            "layer_norm": layer_norm, "scale": scale, "element_order": element_order, "chunk_order": chunk_order,
            "set_attention": set_attention, "num_inducing": num_inducing,
            "order": order, "statistics": statistics, "chunks": chunks,
        }  # fmt: skip
        self.chunk_size, self.chunking, self.hidden_dim = chunk_size, chunking, hidden_dim
        sets = (hidden_dim, num_heads, layer_norm, num_inducing if set_attention == "isab" else None)
        self.type_embedding = nn.Embedding(NUM_TENSOR_TYPES, hidden_dim)
        self.chunk_encoder = ChunkEncoder(hidden_dim, num_heads, layer_norm, element_order) if chunks else None
        self.tensor_encoder = TensorEncoder(*sets, chunk_order) if chunks else None
        self.layer_encoder = SetEncoder(*sets)
        self.network_encoder = NetworkEncoder(*sets)
        self.tensor_statistics = StatisticsChannel(hidden_dim, statistics) if statistics != "none" else None
        self._zero_constants()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name, as :meth:`save_pretrained` stores them."""
        return dict(self._config)

    @property
    def out_features(self) -> int:
        """Width of z: h, with statistics 3h."""
        return self.hidden_dim if self.tensor_statistics is None else 3 * self.hidden_dim

    @property
    def sample_parameter(self) -> Tensor:
        """A parameter, whose dtype and device batches must have; of the type embedding, unless it has been replaced."""
        weight = getattr(self.type_embedding, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
        return next(parameter for parameter in self.parameters() if parameter.is_floating_point())

    @torch.no_grad()
    def _zero_constants(self) -> None:
        # Seeds and biases are the same for every input, and each pooling stage lets them grow over the signal.
        for name, parameter in self.named_parameters():
            if name.endswith((".bias", ".S")):
                parameter.zero_()

    @torch.no_grad()
    def fill_code_gains(self, gain: float) -> None:
        """Set the gains of all three codes, which start at 0.1.

        At 1 the encoder learns from its start which layer and which place in a tensor a weight has: labels that show in
        the size or order of particular weights were learnt better so, on sines (section 4.1) and on accuracies.

        Raises:
            ValueError: the gain is no finite number.
        """
        if isinstance(gain, bool) or not isinstance(gain, Real) or not math.isfinite(gain):
            raise ValueError(f"SNE: the code gain must be a finite number, got {shown(gain)}")
        for stage in (self.chunk_encoder, self.tensor_encoder, self.network_encoder):
            if stage is not None:
                stage.code_gain.fill_(gain)

    @torch.no_grad()
    def set_statistics(self, batch: WeightBatch) -> None:
        """Set what statistics are standardised by from the training networks; does nothing without statistics.

        The first call also zeroes the rows of the type embedding of tensor types that these networks do not have, since
        they will not be learnt.

        Args:
            batch: the training networks.

        Raises:
            ValueError: a batch without the shapes of its tensors.
        """
        self.set_statistics_sums(*self.statistics_sums(batch))

    @torch.no_grad()
    def statistics_sums(self, batch: WeightBatch) -> tuple[Tensor, Tensor]:
        """Return what :meth:`set_statistics_sums` takes; the values of several batches add up to those of all.

        Returns:
            Sums of the statistics, empty without statistics, and the number of tensors of each type, float64 on the
            CPU.
        """
        channel = self.tensor_statistics
        sums = torch.zeros(0, dtype=torch.float64) if channel is None else channel.sums(batch)
        return sums, torch.bincount(batch.tensor_type.cpu(), minlength=NUM_TENSOR_TYPES).double()

    @torch.no_grad()
    def set_statistics_sums(self, sums: Tensor, types: Tensor) -> None:
        """Do what :meth:`set_statistics` does, by what :meth:`statistics_sums` returned of the training networks."""
        if self.tensor_statistics is not None and self.tensor_statistics.set_sums(sums):
            self.type_embedding.weight[(types == 0).to(self.type_embedding.weight.device)] = 0

    def pack(self, networks: Networks, **options: Any) -> WeightBatch:
        """Pack networks as this encoder expects them: with its chunk size, chunking, scale, order, dtype and device.

        Args:
            networks: modules, state_dicts or paths.
            options: further arguments of :func:`sne_fast.pack`.
        """
        batch = pack(networks, **{**self.pack_options, **options})
        if self.tensor_statistics is not None:
            tensor_statistics(batch)  # which a compiled graph does not compute
        return batch

    @property
    def pack_options(self) -> dict[str, Any]:
        """The arguments of :func:`sne_fast.pack` by which :meth:`pack` packs."""
        weight = self.sample_parameter
        expected = {field: self._config[field] for field in PACKED_BY}
        return {**expected, "dtype": weight.dtype, "device": weight.device}

    def forward(self, networks: WeightBatch | Networks) -> Tensor:
        """Encode a batch, or networks, which are packed first, to one vector each.

        Returns:
            z ``(B, out_features)`` in the dtype of the parameters, a row per network.

        Raises:
            ValueError: the batch was cut, scaled or ordered otherwise than this encoder expects, or has another dtype
                or device.
        """
        batch = networks if isinstance(networks, WeightBatch) else self.pack(networks)
        self.check_batch(batch)
        weights = self.folded_weights()
        if fits_at_once(batch.num_weights, batch.device):
            encoded = self.encode_batch_layers(batch, weights=weights)
        else:
            apart = layers_apart(batch)
            runs = network_runs(apart.network_starts, batch.device)
            encoded = LayerEncodings.cat([self.encode_batch_layers(apart[run], weights=weights) for run in runs])
        return self.join_layers(encoded, batch.network_ptr, batch.network_ptr_host, weights)

    def folded_weights(self) -> dict[str, StageWeights]:
        """Fold and join the parameters of all stages, for one or more passes with the same parameters.

        Stages with modules that have been replaced or have hooks are not among the results.
        """
        plain = {}
        for name, kind in STAGES.items():
            stage = getattr(self, name)
            if is_plain(stage, kind) and stage.is_plain():
                plain[name] = stage.blocks_and_pool()
        if not plain:
            return {}
        return dict(zip(plain, fold_stages(list(plain.values()), "chunk_encoder" in plain), strict=True))

    def encode_batch_layers(
        self, batch: WeightBatch, sample: ChunkSample | None = None, weights: dict[str, StageWeights] | None = None
    ) -> LayerEncodings:
        """Apply stages 1 to 3 to all layers of a checked batch at once, or to a sample of its chunks.

        ``weights`` are those of :meth:`folded_weights`, where they serve several calls.
        """
        weights = {} if weights is None else weights  # the stages fold their own
        type_code, tensor_level_code = self._tensor_codes(batch)
        told: Tensor | None = None
        pooled: Tensor | None = None
        halves: Tensor | None = None
        if self.tensor_statistics is not None:
            told, pooled = self.tensor_statistics(batch, type_code, tensor_level_code)  # [T, h], [L, 2h]

        if self.chunk_encoder is None or self.tensor_encoder is None:
            assert told is not None
            layers = self._encode_tensors(told, batch, weights)
            return LayerEncodings(layers, batch.layer_level, lengths(batch.layer_ptr), pooled)
        chunked = batch if sample is None else sample.batch
        given = _given(weights, "chunk_encoder")
        chunks = self.chunk_encoder(chunked, type_code + tensor_level_code, *given)  # [N, h]
        positions, index = batch.chunk_positions, None if sample is None else sample.position
        # What nothing else refers to may be overwritten.
        own = is_plain(self.chunk_encoder, ChunkEncoder) and is_plain(self.tensor_encoder, TensorEncoder)

        def encode(x: Tensor, ptr: Tensor, ptr_host: Tensor, index: Tensor | None) -> Tensor:
            assert self.tensor_encoder is not None
            given = _given(weights, "tensor_encoder")
            tensors = self.tensor_encoder(
                x, ptr, ptr_host, batch.tensor_scale, tensor_level_code, positions, index, *given, overwrite=own
            )  # [T, h]
            return self._encode_tensors(tensors if told is None else tensors + told, batch, weights)

        if sample is not None and sample.halves:
            parts = [encode(chunks[h.rows], h.tensor_ptr, h.tensor_ptr_host, h.position) for h in sample.halves]
            halves = torch.stack(parts)
        vectors = encode(chunks, chunked.tensor_ptr, chunked.tensor_ptr_host, index)
        return LayerEncodings(vectors, batch.layer_level, lengths(batch.layer_ptr), pooled, halves)

    def _tensor_codes(self, batch: WeightBatch) -> tuple[Tensor, Tensor]:
        """Return `E[type]` and `P(level)` of all tensors, `(T, h)` each."""
        declare_lasting(*(getattr(batch, field) for field in LASTING))
        level_code = self._level_code(batch.layer_level)  # [L, h]
        layer_of_tensor = owners(batch.layer_ptr, batch.tensor_type.shape[0])
        return self.type_embedding(batch.tensor_type), level_code.index_select(0, layer_of_tensor)

    def statistics_units(self, batch: WeightBatch) -> Tensor:
        """Return the means over each network's tensors of the hidden units of the statistics channel, `(B, 4h)`.

        The last 2h values of z are a linear map of them, `tensor_statistics.to_pool`.

        Raises:
            ValueError: an encoder without statistics, or a batch that was not packed for it.
        """
        if self.tensor_statistics is None:
            raise ValueError("SNE: statistics_units needs statistics='relative' or 'tensor'")
        self.check_batch(batch)
        units = self.tensor_statistics.units(batch, *self._tensor_codes(batch))
        alike = units.new_zeros((units.shape[0], 1))  # logits: a mean
        ptr, ptr_host = batch.layer_ptr[batch.network_ptr], batch.layer_ptr_host[batch.network_ptr_host]
        return functional.segment_pool(units, alike, ptr, ptr_host=ptr_host).squeeze(1)

    def _encode_tensors(self, tensors: Tensor, batch: WeightBatch, weights: dict[str, StageWeights]) -> Tensor:
        given = _given(weights, "layer_encoder")
        layers: Tensor = self.layer_encoder(tensors, batch.layer_ptr, batch.layer_ptr_host, *given)  # [L, h]
        return layers

    def join_layers(
        self,
        encodings: LayerEncodings,
        network_ptr: Tensor,
        network_ptr_host: Tensor,
        weights: dict[str, StageWeights] | None = None,
    ) -> Tensor:
        """Apply stage 4 to checked encodings, with the pointers of networks also on the CPU.

        ``weights`` are those of :meth:`folded_weights`, where they serve several calls.
        """
        given = _given({} if weights is None else weights, "network_encoder")
        level_code = self._level_code(encodings.levels)  # [L, h]
        z = self.network_encoder(encodings.vectors, network_ptr, network_ptr_host, level_code, *given)  # [B, h]
        if self.tensor_statistics is not None and encodings.pooled is not None:
            pooled = self.tensor_statistics.join(encodings.pooled, encodings.tensors, network_ptr, network_ptr_host)
            z = torch.cat([z, pooled], 1)
        return z.to(level_code.dtype)

    def _level_code(self, levels: Tensor) -> Tensor:
        width, dtype = self.hidden_dim, self.sample_parameter.dtype
        return derived(levels, ("P", width, dtype), lambda: position_code(levels, width, dtype))

    def check_batch(self, batch: WeightBatch) -> None:
        """Raise ValueError for a batch that was not packed as this encoder expects."""
        for field in PACKED_BY:
            want, got = self._config[field], getattr(batch, field)
            if want != got:
                raise ValueError(
                    f"SNE: batch must be packed with {field}={want!r} as this encoder was made, got {got!r}; "
                    f"use encoder.pack(networks)"
                )
        weight = self.sample_parameter
        if batch.values.dtype != weight.dtype or batch.values.device != weight.device:
            raise ValueError(
                f"SNE: batch must have the encoder's dtype {weight.dtype} and device {weight.device}, got "
                f"{batch.values.dtype} on {batch.values.device}; use batch.to(device, dtype)"
            )

    def extra_repr(self) -> str:
        """Return the constructor's arguments, which `repr` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())
