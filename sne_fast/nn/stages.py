"""The four stages of the encoder: chunk, tensor, layer, network."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..ops import functional
from ..ops.calls import autocast
from ..ops.pointer_facts import derived, owners, places
from .blocks import ISAB, MAB, PMA, SAB, has_plain_attention
from .bounded_memory import is_large, joined, row_runs, set_runs
from .plain_modules import is_plain
from .position_codes import reversed_position_code
from .stage_weights import StageWeights, fold_stages

INITIAL_CODE_GAIN = 0.1


def _chunks_of(batch: WeightBatch, run: slice | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return values, chunk_ptr, tensor_ptr and the copies of both on the CPU, of all chunks or of a run of them."""
    values, chunk_ptr, tensor_ptr = batch.values, batch.chunk_ptr, batch.tensor_ptr
    chunk_ptr_host, tensor_ptr_host = batch.chunk_ptr_host, batch.tensor_ptr_host
    if run is None:
        return values, chunk_ptr, tensor_ptr, chunk_ptr_host, tensor_ptr_host
    first, last = int(chunk_ptr_host[run.start]), int(chunk_ptr_host[run.stop])
    bounds = slice(run.start, run.stop + 1)
    tensor_ptr, tensor_ptr_host = (p.clamp(run.start, run.stop) - run.start for p in (tensor_ptr, tensor_ptr_host))
    return values[first:last], chunk_ptr[bounds] - first, tensor_ptr, chunk_ptr_host[bounds] - first, tensor_ptr_host


class ChunkEncoder(nn.Module):
    """Stage 1 (eq. 2-6): encode the scalars of each chunk to one vector, through the fused op ``chunk_encode``.

    Where a block, the pool or a module inside them has hooks or has been replaced, the modules are called instead.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, hidden_dim: int, num_heads: int, layer_norm: bool, element_order: bool) -> None:
        super().__init__()
        self.element_order = element_order
        self.blocks = nn.ModuleList(
            SAB(1 if b == 0 else hidden_dim, hidden_dim, num_heads, layer_norm) for b in range(4)
        )
        self.pool = PMA(hidden_dim, num_heads, 1, layer_norm)
        self.code_gain = nn.Parameter(torch.tensor(INITIAL_CODE_GAIN))

    def forward(self, batch: WeightBatch, tensor_code: Tensor, weights: StageWeights | None = None) -> Tensor:
        """Encode all chunks to ``(N, h)``; ``tensor_code (T, h)`` is ``E[type] + P(level)``, before the gain.

        ``weights`` are the parameters where the caller has joined those of several stages, all plain.
        """
        if weights is not None or self.is_plain():
            folded = self.folded_weights() if weights is None else weights

            def encode(run: slice | None) -> Tensor:
                pooled = self.pooled_rows(batch, tensor_code, run, folded)
                return self.pool.project(pooled, folded.pool).squeeze(1)
        else:

            def encode(run: slice | None) -> Tensor:
                return self.encode_by_modules(batch, tensor_code, run)

        runs = list(row_runs(batch.chunk_ptr_host.shape[0] - 1, batch.device))
        # Straight into the result: (N, H, h) would be the largest tensor of a pass without gradients.
        return encode(None) if len(runs) == 1 else joined(encode, runs)

    def is_plain(self) -> bool:
        """Return whether ``chunk_encode`` computes what the blocks and the pool would compute if they were called."""
        blocks, pool = list(self.blocks), self.pool
        if len(blocks) != 4 or not is_plain(pool, PMA) or not has_plain_attention(pool.mab):
            return False
        if not all(is_plain(block, SAB) for block in blocks):
            return False
        mabs = [cast(SAB, block).mab for block in blocks]
        if not all(has_plain_attention(mab) and mab.has_plain_feed_forward() for mab in mabs):
            return False
        alike = {(mab.num_heads, mab.ln0 is not None) for mab in mabs}
        return len(alike) == 1 and mabs[0].num_heads == pool.mab.num_heads

    def pooled_rows(
        self, batch: WeightBatch, tensor_code: Tensor, run: slice | None = None, weights: StageWeights | None = None
    ) -> Tensor:
        """Return the rows of all chunks, or of a run, pooled per head: ``(N, H, h)``, before the pool's ``fc_v``."""
        values, chunk_ptr, tensor_ptr, chunk_ptr_host, tensor_ptr_host = _chunks_of(batch, run)
        element_code = self._element_code(batch, tensor_code)
        # One product and one cast of all codes.
        (codes,) = autocast(self.code_gain * torch.cat([tensor_code, element_code]))
        row_code, element_code = codes.split([tensor_code.shape[0], element_code.shape[0]])
        if not self.element_order:
            element_code = torch.zeros_like(element_code)
        return functional.chunk_encode(
            values,
            chunk_ptr,
            tensor_ptr,
            row_code,
            element_code,
            **(self.folded_weights() if weights is None else weights).chunk_encode,
            chunk_ptr_host=chunk_ptr_host,
            tensor_ptr_host=tensor_ptr_host,
        )

    def encode_by_modules(self, batch: WeightBatch, tensor_code: Tensor, run: slice | None = None) -> Tensor:
        """Encode all chunks, or a run, to ``(N, h)`` by calling the blocks and the pool on the rows of all scalars."""
        values, chunk_ptr, tensor_ptr, chunk_ptr_host, _ = _chunks_of(batch, run)
        blocks, gain = list(self.blocks), self.code_gain
        chunk_of_row, tensor_of_chunk = owners(chunk_ptr, values.shape[0]), owners(tensor_ptr, chunk_ptr.shape[0] - 1)
        # Not index_select, whose gradient on a GPU adds in any order.
        code = gain * tensor_code[tensor_of_chunk.index_select(0, chunk_of_row)]
        if self.element_order:
            place = places(chunk_ptr, values.shape[0])
            code = code + gain * self._element_code(batch, tensor_code).index_select(0, place)
        x = values[:, None]
        for block in blocks[:2]:
            x = block(x, chunk_ptr, chunk_ptr_host)
        x = x + code
        for block in blocks[2:]:
            x = block(x, chunk_ptr, chunk_ptr_host)
        return self.pool(x, chunk_ptr, chunk_ptr_host).squeeze(1)

    def _element_code(self, batch: WeightBatch, tensor_code: Tensor) -> Tensor:
        size, width, dtype = batch.chunk_size, tensor_code.shape[1], self.code_gain.dtype

        def make() -> Tensor:
            return reversed_position_code(torch.arange(size, device=self.code_gain.device), width, dtype)

        return derived(batch.chunk_ptr, ("codes of elements", size, width, dtype), make)

    def blocks_and_pool(self) -> tuple[list[MAB], PMA]:
        """Return the attention blocks and the pool, for :func:`sne_fast.nn.stage_weights.fold_stages`."""
        return [cast(SAB, block).mab for block in self.blocks], self.pool

    def folded_weights(self) -> StageWeights:
        """Fold the named parameters into the arguments of :func:`sne_fast.functional.chunk_encode`, and of the pool.

        The algebra is in docs/method.md, "Algebra of the fast code".
        """
        (folded,) = fold_stages([self.blocks_and_pool()], with_chunks=True)
        return folded


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

    def attend(self, x: Tensor, ptr: Tensor, ptr_host: Tensor, weights: StageWeights | None = None) -> Tensor:
        """Apply the two blocks to ``x (rows, h)``; the shape stays."""
        given = () if weights is None else weights.blocks
        for i, block in enumerate(self.blocks):
            if not given:
                x = block(x, ptr, ptr_host)
            elif isinstance(block, SAB):
                x = block(x, ptr, ptr_host, given[i])
            else:
                x = block(x, ptr, ptr_host, given[2 * i : 2 * i + 2])
        return x

    def forward(self, x: Tensor, ptr: Tensor, ptr_host: Tensor, weights: StageWeights | None = None) -> Tensor:
        """Encode rows ``x (rows, h)`` in sets ``ptr (S+1,)`` to one vector per set, ``(S, h)``.

        ``weights`` are the parameters where the caller has joined those of several stages, all plain.
        """
        weights = self.folded_weights() if weights is None else weights
        return self.pooled(self.attend(x, ptr, ptr_host, weights), ptr, ptr_host, weights)

    def pooled(self, x: Tensor, ptr: Tensor, ptr_host: Tensor, weights: StageWeights | None) -> Tensor:
        """Pool the rows ``x (rows, h)`` of each set, ``(S, h)``."""
        given = () if weights is None else (weights.pool,)
        found: Tensor = self.pool(x, ptr, ptr_host, *given)
        return found.squeeze(1)

    def blocks_and_pool(self) -> tuple[list[MAB], PMA]:
        """Return the attention blocks and the pool, for :func:`sne_fast.nn.stage_weights.fold_stages`."""
        mabs = []
        for block in self.blocks:
            mabs += [block.mab] if isinstance(block, SAB) else [cast(ISAB, block).mab0, cast(ISAB, block).mab1]
        return mabs, self.pool

    def is_plain(self) -> bool:
        """Return whether ops on the joined parameters compute what calls of blocks and pool would compute."""
        if not self._has_plain_blocks():
            return False
        mabs, pool = self.blocks_and_pool()
        if not all(is_plain(mab, MAB) and mab.is_plain() for mab in (*mabs, pool.mab)):
            return False
        square = pool.mab.fc_v.weight.shape
        return all(fc.weight.shape == square for mab in mabs for fc in (mab.fc_q, mab.fc_k, mab.fc_v))

    def _has_plain_blocks(self) -> bool:
        """Return whether blocks and pool may be called several times, as hooks and other modules might notice."""
        blocks = all(is_plain(block, SAB) or is_plain(block, ISAB) for block in self.blocks)
        return blocks and is_plain(self.pool, PMA)

    def folded_weights(self) -> StageWeights | None:
        """Return the parameters as :meth:`forward` takes them; None where modules have to be called."""
        return fold_stages([self.blocks_and_pool()])[0] if self.is_plain() else None


class TensorEncoder(SetEncoder):
    """Stage 2 (eq. 7): encode the chunks of each tensor to one vector; codes enter between the blocks and the pool."""

    def __init__(
        self, hidden_dim: int, num_heads: int, layer_norm: bool, num_inducing: int | None, chunk_order: bool
    ) -> None:
        super().__init__(hidden_dim, num_heads, layer_norm, num_inducing)
        self.chunk_order = chunk_order
        self.code_gain = nn.Parameter(torch.tensor(INITIAL_CODE_GAIN))
        self.magnitude_code = nn.Parameter(torch.randn(hidden_dim))

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        ptr: Tensor,
        ptr_host: Tensor,
        tensor_scale: Tensor,
        level_code: Tensor,
        positions: Tensor,
        index: Tensor | None = None,
        weights: StageWeights | None = None,
        *,
        overwrite: bool = False,
    ) -> Tensor:
        """Encode chunk vectors ``x (N, h)`` in tensors ``ptr (T+1,)`` to ``(T, h)``.

        Without gradients, large inputs go through in runs of tensors, and a large tensor by tiles of its rows.

        Args:
            x: vectors of chunks.
            ptr: pointers of tensors, with their copy ``ptr_host`` on the CPU.
            ptr_host: see ``ptr``.
            tensor_scale: ``(T,)``, what the values of each tensor were divided by.
            level_code: ``(T, h)``, ``P(level)`` of each tensor.
            positions: ``(P,)`` positions of chunks in their tensors.
            index: ``(N,)``, which of ``positions`` each chunk has; None for 0, 1, ... in each tensor.
            weights: the parameters where the caller has joined those of several stages, all plain.
            overwrite: whether ``x`` may be overwritten, so that a large tensor needs no second copy.
        """
        runs = set_runs(ptr_host, x.device) if self._has_plain_blocks() else None
        weights = self.folded_weights() if weights is None else weights
        if runs is None:
            return self._encode(x, ptr, ptr_host, (level_code, tensor_scale), positions, index, weights)
        encoded = []
        for run, rows in runs:
            part, own_index = x[rows], None if index is None else index[rows]
            bounds = slice(run.start, run.stop + 1)
            pointers = (ptr[bounds] - rows.start, ptr_host[bounds] - rows.start)
            codes = (level_code[run], tensor_scale[run])
            if is_large(part.shape[0], x.device) and self._has_tiles():
                part = part if overwrite else part.clone()
                encoded.append(self._encode_by_tiles(part, *pointers, self._row_code(*codes), positions, own_index))
            else:
                encoded.append(self._encode(part, *pointers, codes, positions, own_index, weights))
        return torch.cat(encoded)

    def _row_code(self, level_code: Tensor, scale: Tensor) -> Tensor:
        return self.code_gain * (level_code + scale.log().to(self.code_gain.dtype)[:, None] * self.magnitude_code)

    def _encode(
        self, x: Tensor, ptr: Tensor, ptr_host: Tensor, codes: tuple[Tensor, Tensor], positions: Tensor,
        index: Tensor | None, weights: StageWeights | None,
    ) -> Tensor:  # fmt: skip
        x = self.attend(x, ptr, ptr_host, weights)
        (chunks, width), dtype = x.shape, self.code_gain.dtype
        tensor_of_chunk = owners(ptr, chunks)
        level_code, scale = codes
        if index is None and functional.fuses_add_codes(x, level_code, scale):
            table = level_code[:0]
            if self.chunk_order:
                table = derived(positions, ("R", width, dtype), lambda: reversed_position_code(positions, width, dtype))
            rows = (ptr, ptr_host, level_code, table, scale.to(dtype))
            x = functional.add_codes(x, *rows, self.magnitude_code, self.code_gain)
            return self.pooled(x, ptr, ptr_host, weights)
        # Before parameters enter, as the gradient of index_select on a GPU adds in any order; that of indexing sorts.
        code = level_code.index_select(0, tensor_of_chunk)
        if self.chunk_order and index is None:
            table = derived(positions, ("R", width, dtype), lambda: reversed_position_code(positions, width, dtype))
            code = code + table.index_select(0, places(ptr, chunks))
        elif self.chunk_order and index is not None:
            code = code + reversed_position_code(positions.index_select(0, index), width, dtype)
        x = x + self._row_code(code, scale[tensor_of_chunk])
        return self.pooled(x, ptr, ptr_host, weights)

    def _has_tiles(self) -> bool:
        """Return whether a large tensor may go through in tiles: nothing but plain induced blocks."""
        return all(is_plain(block, ISAB) and cast(ISAB, block).has_tiles() for block in self.blocks)

    def _encode_by_tiles(
        self, x: Tensor, ptr: Tensor, ptr_host: Tensor, row_code: Tensor, positions: Tensor, index: Tensor | None
    ) -> Tensor:
        """Encode the chunks of one tensor in place, by tiles."""
        for block in self.blocks:
            cast(ISAB, block).apply_in_place(x)
        gain = self.code_gain
        for run in row_runs(x.shape[0], x.device):
            x[run] += row_code
            if self.chunk_order:
                at = positions[run] if index is None else positions[index[run]]
                x[run] += gain * reversed_position_code(at, x.shape[1], gain.dtype)
        return self.pool(x, ptr, ptr_host).squeeze(1)


class NetworkEncoder(SetEncoder):
    """Stage 4 (eq. 9): encode the layers of each network, each with the code of its level, to one vector."""

    def __init__(self, hidden_dim: int, num_heads: int, layer_norm: bool, num_inducing: int | None) -> None:
        super().__init__(hidden_dim, num_heads, layer_norm, num_inducing)
        self.code_gain = nn.Parameter(torch.tensor(INITIAL_CODE_GAIN))

    def forward(  # type: ignore[override]
        self, x: Tensor, ptr: Tensor, ptr_host: Tensor, level_code: Tensor, weights: StageWeights | None = None
    ) -> Tensor:
        """Encode layer vectors ``x (L, h)`` in networks ``ptr (B+1,)`` to ``(B, h)``.

        ``level_code (L, h)`` is ``P(level)`` of each layer; ``weights`` as in :class:`SetEncoder`.
        """
        if functional.fuses_add_codes(x, level_code):
            none = (
                ptr[:0],
                ptr_host[:0],
                level_code,
                level_code[:0],
                level_code[:0, 0],
                level_code.new_empty(x.shape[1]),
            )
            return super().forward(functional.add_codes(x, *none, self.code_gain), ptr, ptr_host, weights)
        return super().forward(x + self.code_gain * level_code, ptr, ptr_host, weights)
