"""Training without labels: two views of a network are to be nearer to each other than to views of other networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.batch import WeightBatch
from ..data.weight_budgets import batches_by_weights, network_sizes
from ..nn.chunk_samples import sample_chunks
from ..nn.encoder import SNE
from ..nn.predictor import PredictorHead
from .digests import of_values
from .objective import Augment, Encode, Losses


class ContrastiveModel(nn.Module):
    """An encoder with what its training without labels needs besides, and is thrown away afterwards.

    Args:
        encoder: the encoder.
        projected: width of the projections that are compared.
        labels: names of labels that linear heads on z predict besides, each with its number of classes, or 1 for a
            number.

    Attributes:
        projection: an MLP with a hidden layer, from z `(B, encoder.out_features)` to `(B, projected)`.
        heads: a linear layer for each label.

    Example:
        >>> model = ContrastiveModel(sne_fast.SNE(hidden_dim=32), projected=16)
        >>> model.project(model.encoder(batch)).shape
        torch.Size([2, 16])
    """

    def __init__(self, encoder: SNE, projected: int = 64, labels: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.out_features
        self.projection = PredictorHead(width, projected, (2 * width,))
        self.heads = nn.ModuleDict({name: nn.Linear(width, outputs) for name, outputs in (labels or {}).items()})

    def project(self, z: Tensor) -> Tensor:
        """Return projections of length 1, `(B, projected)`."""
        return F.normalize(self.projection(z), dim=1)


class Contrastive:
    """The contrastive loss of the networks of a batch, InfoNCE (van den Oord et al. 2018) on two views of each.

    With projections `a_i`, `b_i` of the two views of network i, of length 1, and a temperature t, the loss of network i
    is the cross entropy of `softmax_j(<a_i, b_j> / t)` towards i, averaged with that of `softmax_j(<b_i, a_j> / t)`.

    Networks of the same group, such as one made of the other, are no negatives of each other: with `relatives` 0 they
    do not meet, and otherwise the cross entropy is towards i with weight 1 and towards its relatives in the batch with
    that weight each.

    Batches larger than memory are encoded piece by piece, and each piece again when its gradient is known (gradient
    caching, Gao et al. 2021): the gradient is that of the whole batch.

    Args:
        model: encoder, projection and heads.
        views: changes a batch; called twice for every batch.
        temperature: t.
        groups: of all training networks, `(N,)` integers; by default each is a group of its own.
        relatives: weight of networks of the same group as positives.
        labels: of all training networks by the names of the model's heads: `(N,)` int64 of classes, -1 where one is not
            known, or `(N,)` floating, NaN where one is not known. Numbers are to be normalised.
        label_weight: of the loss of each head.
        weights_at_once: largest number of weights that are encoded with a graph; None is any number.
        max_chunks: encode a random sample of so many chunks of each larger tensor, at least 2, another for each view.
            It makes steps on large networks cheaper; statistics of tensors are those of all their weights.

    Raises:
        ValueError: labels that are not those of the model's heads.
    """

    def __init__(
        self,
        model: ContrastiveModel,
        views: Augment,
        *,
        temperature: float = 0.1,
        groups: Tensor | None = None,
        relatives: float = 0.0,
        labels: Mapping[str, Tensor] | None = None,
        label_weight: float = 0.1,
        weights_at_once: int | None = None,
        max_chunks: int | None = None,
    ) -> None:
        self.model, self.views, self.temperature = model, views, temperature
        self.groups, self.relatives, self.labels = groups, relatives, dict(labels or {})
        self.label_weight, self.weights_at_once, self.max_chunks = label_weight, weights_at_once, max_chunks
        if set(self.labels) != set(model.heads):
            raise ValueError(
                f"Contrastive: labels must be {sorted(model.heads)} as the heads, got {sorted(self.labels)}"
            )

    @property
    def described(self) -> dict[str, Any]:
        """The arguments as plain values, tensors as digests, without the model and the views."""
        return {
            "temperature": self.temperature,
            "groups": None if self.groups is None else of_values(self.groups),
            "relatives": self.relatives,
            "labels": {name: of_values(labels) for name, labels in sorted(self.labels.items())},
            "label_weight": self.label_weight,
            "max_chunks": self.max_chunks,
        }

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator, encode: Encode, /) -> Losses:
        """Return the losses of networks: summed with those of the heads, and the contrastive loss of each.

        Args:
            part: n networks.
            rows: their places among the training networks.
            generator: the source of all randomness, on the CPU.
            encode: encodes a batch.
        """
        encoded = []
        for _ in range(2):
            view = self.views(part, rows, generator)
            if self.max_chunks is not None:
                seed = int(torch.randint(2**31, (), generator=generator))
                encode = partial(encode_sample, self.model.encoder, max_chunks=self.max_chunks, seed=seed)
            encoded.append(encode_in_pieces(encode, view, self.weights_at_once))
        index = torch.tensor(list(rows), dtype=torch.int64)
        # In the parameters' own type also under autocast: a temperature of 0.1 makes the rounding of products large.
        with torch.autocast(part.device.type, enabled=False):
            return self._losses(torch.cat(encoded).to(self.model.encoder.sample_parameter.dtype), index)

    def _losses(self, z: Tensor, index: Tensor) -> Losses:
        """Return the losses of networks by the encodings of their two views, `(2n, h)`, and their places `(n,)`."""
        a, b = self.model.project(z).split(len(index))
        alike = None
        if self.groups is not None:
            own = self.groups[index]
            alike = (own[:, None] == own).to(z.device)
        shown = info_nce(a, b, self.temperature, alike, self.relatives)
        total = shown.sum()
        for name, labels in self.labels.items():
            wanted = labels[index].to(z.device).repeat(2)
            total = total + self.label_weight * _label_loss(self.model.heads[name](z), wanted) / 2
        return Losses(total, shown)


def info_nce(
    a: Tensor, b: Tensor, temperature: float = 0.1, alike: Tensor | None = None, relatives: float = 0.0
) -> Tensor:
    """Return the contrastive loss of each of n pairs, `(n,)`; see :class:`Contrastive` for the formula.

    Args:
        a: `(n, d)` of length 1, of one view.
        b: `(n, d)`, of the other.
        temperature: above 0.
        alike: `(n, n)` bool, pairs that are no negatives of each other.
        relatives: weight of such pairs as positives.
    """
    logits = a @ b.T / temperature
    wanted = torch.eye(len(a), dtype=logits.dtype, device=a.device)
    if alike is not None:
        others = alike & (wanted == 0)
        if relatives:
            wanted = wanted + relatives * others
            wanted = wanted / wanted.sum(1, keepdim=True)
        else:
            logits = logits.masked_fill(others, torch.finfo(logits.dtype).min)
    by_row, by_column = (F.cross_entropy(part, wanted, reduction="none") for part in (logits, logits.T))
    return (by_row + by_column) / 2


def encode_sample(encoder: SNE, batch: WeightBatch, max_chunks: int, seed: int) -> Tensor:
    """Encode a batch from a stratified sample of the chunks of its tensors, with gradients.

    Args:
        encoder: the encoder.
        batch: B networks.
        max_chunks: chunks of each tensor that has more, at least 2.
        seed: of the sample.

    Returns:
        `(B, encoder.out_features)`.
    """
    encoder.check_batch(batch)
    sample = None if encoder.chunk_encoder is None else sample_chunks(batch, max_chunks, seed)
    weights = encoder.folded_weights()
    layers = encoder.encode_batch_layers(batch, None if sample is None else sample._replace(halves=()), weights)
    return encoder.join_layers(layers, batch.network_ptr, batch.network_ptr_host, weights)


def encode_in_pieces(encode: Encode, batch: WeightBatch, weights_at_once: int | None) -> Tensor:
    """Encode a batch piece by piece, without keeping what the backward pass needs.

    Each piece is encoded again in the backward pass, when its gradient is known, so only one piece at a time takes the
    memory of a training step; values and gradients are those of encoding each piece at once.

    Args:
        encode: encodes a batch; it must not draw random numbers.
        batch: B networks.
        weights_at_once: largest number of weights of a piece; a network with more is a piece of its own. None, or a
            batch that is not larger, encodes the batch at once.

    Returns:
        `(B, h)`.
    """
    if weights_at_once is None or batch.num_weights <= weights_at_once:
        return encode(batch)
    pieces = [batch[rows] for rows in batches_by_weights(network_sizes(batch), weights_at_once)]
    if not torch.is_grad_enabled():
        return torch.cat([encode(piece) for piece in pieces])
    return torch.cat([checkpoint(encode, piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces])


def _label_loss(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Return the summed loss of a head's outputs where the label is known."""
    if wanted.dtype.is_floating_point:
        known = ~wanted.isnan()
        return (outputs[:, 0] - wanted.to(outputs)).masked_fill(~known, 0.0).square().sum()
    return F.cross_entropy(outputs, wanted, ignore_index=-1, reduction="sum")


def linear_probe(z: Tensor, labels: Tensor, train: Tensor, ridge: float = 1e-2) -> float:
    """Return how well a linear map of encodings predicts labels of networks that it was not fitted to.

    Ridge regression in closed form on standardised encodings, for classes on their indicators.

    Args:
        z: `(N, h)`.
        labels: `(N,)`, int64 of classes, or floating; networks with -1 or NaN are left out.
        train: `(N,)` bool, networks to fit to; it is scored on the others.
        ridge: weight of the squared map, relative to the number of networks.

    Returns:
        Accuracy for classes, R2 for numbers; NaN where one of the parts is empty, or numbers are all the same.
    """
    known = ~labels.isnan() if labels.dtype.is_floating_point else labels >= 0
    fitted, held = train & known, ~train & known
    if not bool(fitted.any()) or not bool(held.any()):
        return float("nan")
    z = z.detach().double()
    z = (z - z[fitted].mean(0)) / z[fitted].std(0, unbiased=False).clamp_min(1e-9)
    wanted = labels.double()[:, None] if labels.dtype.is_floating_point else F.one_hot(labels.clamp_min(0)).double()
    mean = wanted[fitted].mean(0)
    gram = z[fitted].T @ z[fitted] + ridge * int(fitted.sum()) * torch.eye(z.shape[1], dtype=z.dtype)
    found = z[held] @ torch.linalg.solve(gram, z[fitted].T @ (wanted[fitted] - mean)) + mean
    if labels.dtype.is_floating_point:
        spread = (wanted[held] - wanted[held].mean()).square().sum()
        return float(1 - (found - wanted[held]).square().sum() / spread) if spread > 0 else float("nan")
    return float((found.argmax(1) == labels[held]).double().mean())
