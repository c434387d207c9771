"""The encoder :class:`SNE` and its four stages: chunk, tensor, layer, network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..data.batch_checks import CHUNKINGS, NUM_TENSOR_TYPES
from ..data.choices import Chunking, Scale
from ..data.packing import SCALES, pack
from ..ops import functional
from .blocks import ISAB, PMA, SAB
from .bounded_memory import fits_at_once, joined, network_runs, row_runs
from .choices import SetAttention
from .config_checks import choice, flag, integer
from .position_codes import position_code, reversed_position_code
from .pretrained import PretrainedMixin

INITIAL_CODE_GAIN = 0.1
MAX_CHUNK_SIZE = 2**16
"""Attention inside a chunk is quadratic in its size, and every forward pass makes a code for each place in a chunk."""
SET_ATTENTIONS = get_args(SetAttention)


class ChunkEncoder(nn.Module):
    """Stage 1 (eq. 2-6): encode the scalars of each chunk to one vector, through the fused op ``chunk_encode``."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden_dim: int, num_heads: int, layer_norm: bool, element_order: bool) -> None:
        super().__init__()
        self.element_order = element_order
        self.blocks = nn.ModuleList(
            SAB(1 if b == 0 else hidden_dim, hidden_dim, num_heads, layer_norm) for b in range(4)
        )
        self.pool = PMA(hidden_dim, num_heads, 1, layer_norm)
        self.code_gain = nn.Parameter(torch.tensor(INITIAL_CODE_GAIN))

    def forward(self, batch: WeightBatch, tensor_code: Tensor) -> Tensor:
        """Encode all chunks to ``(N, h)``; ``tensor_code (T, h)`` is ``E[type] + P(level)``, before the gain."""
        runs = list(row_runs(batch.chunk_ptr_host.shape[0] - 1, batch.device))
        if len(runs) == 1:
            return self.pool.project(self.pooled_rows(batch, tensor_code)).squeeze(1)
        # Straight into the result: (N, H, h) would be the largest tensor of a pass without gradients.
        return joined(lambda run: self.pool.project(self.pooled_rows(batch, tensor_code, run)).squeeze(1), runs)

    def pooled_rows(self, batch: WeightBatch, tensor_code: Tensor, run: slice | None = None) -> Tensor:
        """Return the rows of all chunks, or of a run, pooled per head: ``(N, H, h)``, before the pool's ``fc_v``."""
        values, chunk_ptr, tensor_ptr = batch.values, batch.chunk_ptr, batch.tensor_ptr
        chunk_ptr_host, tensor_ptr_host = batch.chunk_ptr_host, batch.tensor_ptr_host
        if run is not None:
            first, last = int(chunk_ptr_host[run.start]), int(chunk_ptr_host[run.stop])
            bounds = slice(run.start, run.stop + 1)
            values, chunk_ptr, chunk_ptr_host = (
                values[first:last],
                chunk_ptr[bounds] - first,
                chunk_ptr_host[bounds] - first,
            )
            tensor_ptr, tensor_ptr_host = (
                p.clamp(run.start, run.stop) - run.start for p in (tensor_ptr, tensor_ptr_host)
            )
        gain, width = self.code_gain, tensor_code.shape[1]
        element = torch.arange(batch.chunk_size, device=gain.device)
        element_code = reversed_position_code(element, width, gain.dtype)
        return functional.chunk_encode(
            values,
            chunk_ptr,
            tensor_ptr,
            gain * tensor_code,
            gain * element_code if self.element_order else torch.zeros_like(element_code),
            **self.folded_parameters(),
            chunk_ptr_host=chunk_ptr_host,
            tensor_ptr_host=tensor_ptr_host,
        )

    def folded_parameters(self) -> dict[str, Tensor]:
        """Fold the named parameters into the arguments of :func:`sne_fast.functional.chunk_encode`.

        The algebra is in docs/method.md, "Algebra of the fast code".
        """
        mabs = [cast(SAB, block).mab for block in self.blocks]
        first, *rest = mabs
        heads = first.num_heads
        with torch.autocast(self.code_gain.device.type, enabled=False):
            w_q, w_k, w_v = (fc.weight[:, 0] for fc in (first.fc_q, first.fc_k, first.fc_v))
            # fc_k.bias is constant in the softmax: it enters times 0, because DDP wants a gradient for every parameter.
            slope = torch.stack([w_q * w_k, first.fc_q.bias * w_k + 0 * first.fc_k.bias])
            # No walrus in the comprehension: Dynamo cannot trace the cell that Python 3.11 makes of it.
            norms = [norm for norm in [mab.norm_parameters() for mab in mabs] if norm is not None]
            return {
                "logit": slope.unflatten(1, (heads, -1)).sum(-1) / math.sqrt(first.dim_v),
                "basis": torch.stack([w_q, w_v, first.fc_q.bias + first.fc_v.bias]),
                "w_qkv": torch.stack([torch.cat([m.fc_q.weight, m.fc_k.weight, m.fc_v.weight]) for m in rest]),
                "b_qkv": torch.stack([torch.cat([m.fc_q.bias, m.fc_k.bias, m.fc_v.bias]) for m in rest]),
                "w_o": torch.stack([m.fc_o.weight for m in mabs]),
                "b_o": torch.stack([m.fc_o.bias for m in mabs]),
                "norm": torch.stack(norms) if norms else w_q.new_empty((0, 4, first.dim_v)),
                "pool_query": self.pool.folded_query(),
            }


class SetEncoder(nn.Module):
    """Stages 2 to 4: two blocks of set attention over the rows of each set, then pooling to one vector per set."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden_dim: int, num_heads: int, layer_norm: bool, num_inducing: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SAB(hidden_dim, hidden_dim, num_heads, layer_norm)
            if num_inducing is None
            else ISAB(hidden_dim, hidden_dim, num_heads, num_inducing, layer_norm)
            for _ in range(2)
        )
        self.pool = PMA(hidden_dim, num_heads, 1, layer_norm)

    def attend(self, x: Tensor, ptr: Tensor, ptr_host: Tensor) -> Tensor:
        """Apply the two blocks to ``x (rows, h)``; the shape stays."""
        for block in self.blocks:
            x = block(x, ptr, ptr_host)
        return x

    def forward(self, x: Tensor, ptr: Tensor, ptr_host: Tensor) -> Tensor:
        """Encode rows ``x (rows, h)`` in sets ``ptr (S+1,)`` to one vector per set, ``(S, h)``."""
        return self.pool(self.attend(x, ptr, ptr_host), ptr, ptr_host).squeeze(1)


class TensorEncoder(SetEncoder):
    """Stage 2 (eq. 7): encode the chunks of each tensor to one vector; codes enter between the blocks and the pool."""

    def __init__(
        self, hidden_dim: int, num_heads: int, layer_norm: bool, num_inducing: int | None, chunk_order: bool
    ) -> None:
        super().__init__(hidden_dim, num_heads, layer_norm, num_inducing)
        self.chunk_order = chunk_order
        self.code_gain = nn.Parameter(torch.tensor(INITIAL_CODE_GAIN))
        self.magnitude_code = nn.Parameter(torch.randn(hidden_dim))

    def encode(self, x: Tensor, batch: WeightBatch, level_code: Tensor) -> Tensor:
        """Encode chunk vectors ``x (N, h)`` to ``(T, h)``; ``level_code (T, h)`` is ``P(level)`` of each tensor."""
        ptr, ptr_host = batch.tensor_ptr, batch.tensor_ptr_host
        x = self.attend(x, ptr, ptr_host)
        chunks, gain = x.shape[0], self.code_gain
        row_code = gain * (level_code + batch.tensor_scale.log().to(gain.dtype)[:, None] * self.magnitude_code)
        tensor_of_chunk = torch.repeat_interleave(
            torch.arange(ptr.shape[0] - 1, device=ptr.device), ptr.diff(), output_size=chunks
        )
        if not self.chunk_order:
            return self.pool(x + row_code.index_select(0, tensor_of_chunk), ptr, ptr_host).squeeze(1)
        table = gain * reversed_position_code(batch.chunk_positions, x.shape[1], gain.dtype)
        position = torch.arange(chunks, device=ptr.device) - ptr.index_select(0, tensor_of_chunk)

        def with_codes(run: slice) -> Tensor:
            return x[run] + row_code.index_select(0, tensor_of_chunk[run]) + table.index_select(0, position[run])

        runs = list(row_runs(chunks, x.device))  # several only without gradients: then x is ours to overwrite
        x = with_codes(runs[0]) if len(runs) == 1 else joined(with_codes, runs, x)
        return self.pool(x, ptr, ptr_host).squeeze(1)


class NetworkEncoder(SetEncoder):
    """Stage 4 (eq. 9): encode the layers of each network, each with the code of its level, to one vector."""

    def __init__(self, hidden_dim: int, num_heads: int, layer_norm: bool, num_inducing: int | None) -> None:
        super().__init__(hidden_dim, num_heads, layer_norm, num_inducing)
        self.code_gain = nn.Parameter(torch.tensor(INITIAL_CODE_GAIN))

    def encode(self, x: Tensor, batch: WeightBatch, level_code: Tensor) -> Tensor:
        """Encode layer vectors ``x (L, h)`` to ``(B, h)``; ``level_code (L, h)`` is ``P(level)`` of each layer."""
        return self(x + self.code_gain * level_code, batch.network_ptr, batch.network_ptr_host)


class SNE(PretrainedMixin, nn.Module):
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
        scale: ``"tensor"`` divides each tensor by its root mean square when packing; ``"none"`` is the paper. A batch
            does not say how it was scaled, so pack with ``encoder.pack``, or with the same ``scale`` here and there.
        element_order: add a code of the element's place to the elements of a chunk.
        chunk_order: add a code of the chunk's place to the chunks of a tensor.
        set_attention: ``"sab"``, quadratic in the chunks of a tensor, or ``"isab"``, linear, for stages 2 to 4.
        num_inducing: inducing points of ``"isab"``.

    Raises:
        ValueError: for an argument outside these.

    Example::

        >>> encoder = sne_fast.SNE(hidden_dim=32)
        >>> encoder([torch.nn.Linear(4, 3), torch.nn.Conv2d(1, 2, 3)]).shape
        torch.Size([2, 32])
    """

    __call__: Callable[..., Tensor]

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
        flag("SNE", "layer_norm", layer_norm)
        flag("SNE", "element_order", element_order)
        flag("SNE", "chunk_order", chunk_order)
        self._config: dict[str, Any] = {
            "hidden_dim": hidden_dim, "num_heads": num_heads, "chunk_size": chunk_size, "chunking": chunking,
            "layer_norm": layer_norm, "scale": scale, "element_order": element_order, "chunk_order": chunk_order,
            "set_attention": set_attention, "num_inducing": num_inducing,
        }  # fmt: skip
        self.chunk_size, self.chunking, self.hidden_dim = chunk_size, chunking, hidden_dim
        sets = (hidden_dim, num_heads, layer_norm, num_inducing if set_attention == "isab" else None)
        self.type_embedding = nn.Embedding(NUM_TENSOR_TYPES, hidden_dim)
        self.chunk_encoder = ChunkEncoder(hidden_dim, num_heads, layer_norm, element_order)
        self.tensor_encoder = TensorEncoder(*sets, chunk_order)
        self.layer_encoder = SetEncoder(*sets)
        self.network_encoder = NetworkEncoder(*sets)
        self._zero_constants()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name, as :meth:`save_pretrained` stores them."""
        return dict(self._config)

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
        """
        for stage in (self.chunk_encoder, self.tensor_encoder, self.network_encoder):
            stage.code_gain.fill_(gain)

    def pack(self, networks: Any, **options: Any) -> WeightBatch:
        """Pack networks as this encoder expects them, by :func:`sne_fast.pack`: its chunking, scale, dtype and device.

        Args:
            networks: modules, state_dicts or paths.
            options: further arguments of :func:`sne_fast.pack`.
        """
        weight = self.type_embedding.weight
        defaults = {"scale": self.config["scale"], "dtype": weight.dtype, "device": weight.device}
        return pack(networks, self.chunk_size, self.chunking, **{**defaults, **options})

    def forward(
        self, networks: WeightBatch | nn.Module | Mapping[str, Any] | str | PathLike[str] | Sequence[Any]
    ) -> Tensor:
        """Encode a batch, or networks, which are packed first, to one vector each.

        Returns:
            z ``(B, hidden_dim)`` in the dtype of the parameters, a row per network.

        Raises:
            ValueError: the batch was cut otherwise than this encoder expects, or has another dtype or device.
        """
        batch = networks if isinstance(networks, WeightBatch) else self.pack(networks)
        self._check_batch(batch)
        if fits_at_once(batch.num_weights, batch.device):
            return self._encode(batch)
        return torch.cat([self._encode(batch[run]) for run in network_runs(batch.network_starts, batch.device)])

    def _encode(self, batch: WeightBatch) -> Tensor:
        dtype = self.type_embedding.weight.dtype
        level_code = position_code(batch.layer_level, self.hidden_dim, dtype)  # [L, h]
        layer_of_tensor = torch.repeat_interleave(
            torch.arange(batch.layer_level.shape[0], device=batch.device),
            batch.layer_ptr.diff(),
            output_size=batch.tensor_type.shape[0],
        )
        tensor_level_code = level_code.index_select(0, layer_of_tensor)  # [T, h]
        chunks = self.chunk_encoder(batch, self.type_embedding(batch.tensor_type) + tensor_level_code)  # [N, h]
        tensors = self.tensor_encoder.encode(chunks, batch, tensor_level_code)  # [T, h]
        layers = self.layer_encoder(tensors, batch.layer_ptr, batch.layer_ptr_host)  # [L, h]
        return self.network_encoder.encode(layers, batch, level_code).to(dtype)  # [B, h]

    def _check_batch(self, batch: WeightBatch) -> None:
        for name in ("chunk_size", "chunking"):
            want, got = getattr(self, name), getattr(batch, name)
            if want != got:
                raise ValueError(
                    f"SNE: batch must be cut with {name} {want!r} as this encoder was made, got {got!r}; "
                    f"use encoder.pack(networks)"
                )
        weight = self.type_embedding.weight
        if batch.values.dtype != weight.dtype or batch.values.device != weight.device:
            raise ValueError(
                f"SNE: batch must have the encoder's dtype {weight.dtype} and device {weight.device}, got "
                f"{batch.values.dtype} on {batch.values.device}; use batch.to(device, dtype)"
            )

    def extra_repr(self) -> str:
        """Return the constructor's arguments, which `repr` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())
