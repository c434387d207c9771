"""The predictor: an encoder with a head that predicts properties of each network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..data.networks import Networks
from ..data.packing import pack
from ..data.tensor_statistics import tensor_statistics
from .choices import FittedScale, Loss, Transform
from .config_checks import choice, integer, integers, listed, shown
from .encoder import SNE
from .input_scales import INPUT_SCALES, InputNormaliser
from .plain_state import unwrapped
from .preparation import Preparation
from .pretrained import PretrainedMixin, about, checked_arguments, read_config, saved_class

TRANSFORMS = get_args(Transform)
LOSSES = get_args(Loss)
MAX_HIDDEN_LAYERS = 1000
LOGIT_MARGIN = 0.01
"""Distance that targets in [0, 1] are kept from the ends before the logit."""


class PredictorHead(nn.Sequential):
    """The paper's predictor head (section 3.8): an MLP with ReLU between its layers.

    Args:
        in_features: width of the encoding.
        out_features: number of predicted values.
        hidden_features: widths of the hidden layers; `()` gives a linear map.

    Shapes: `(B, in_features)` to `(B, out_features)`.

    Raises:
        ValueError: a width that is no integer or below 1, or more than 1000 hidden layers.
    """

    def __init__(self, in_features: int, out_features: int = 1, hidden_features: Sequence[int] = (512, 512)) -> None:
        hidden = integers("PredictorHead", "hidden_features", hidden_features, MAX_HIDDEN_LAYERS)
        widths = [
            integer("PredictorHead", "in_features", in_features),
            *hidden,
            integer("PredictorHead", "out_features", out_features),
        ]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


def _target_names(given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return one name per output, numbered ones if none are given."""
    if given is None:
        return tuple(f"target_{i}" for i in range(count))
    names = listed(given, count) or ()
    if len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"Predictor: target_names must hold {count} name(s), one for each of out_features, got {shown(given)}"
        )
    if len(set(names)) < count:
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"Predictor: target_names must differ, got {shown(twice)} twice")
    return names


class Predictor(PretrainedMixin, nn.Module):
    """Predicts properties of networks from their weights: `t^-1(mean + std * head(encoder(batch)))`.

    `t` is the transform the targets go through before they are normalised, so that outputs are in the targets' own
    units: "identity", or "logit" for targets in [0, 1] such as accuracies. `target_mean` and `target_std`
    `(out_features,)` are buffers, set by `set_targets`; at first 0 and 1.

    With `loss="bce"` the head gives logits of targets in [0, 1], trained by binary cross-entropy, and outputs are their
    sigmoids; with `loss="cross_entropy"` it gives logits of classes, and outputs are probabilities. Neither normalises.

    Args:
        encoder: an `sne_fast.SNE`, also one wrapped by `torch.compile` or `DataParallel`; it is saved without.
        out_features: number of predicted values, or of classes.
        hidden_features: widths of the head's hidden layers.
        target_names: what the outputs are called, one name each.
        target_transform: "identity" or "logit"; "logit" with "mse" only.
        loss: "mse", "bce" or "cross_entropy".
        normalise_inputs: "zoo", or True, divides weights by the RMS that tensors of their kind have in the training
            networks (`InputNormaliser`, fitted by `set_inputs`); "fan_in" multiplies them by the root of their layer's
            fan-in (`FanInScale`). For an encoder with `scale="none"`.
        preparation: what else is done to networks before they are encoded, such as a canonical order of hidden units.
            It is saved with the predictor, and is the same in training, on batches and on files.

    Raises:
        TypeError: `encoder` is no `SNE`, or `preparation` no `Preparation`.
        ValueError: a transform or loss that does not exist or does not fit, not one name per output, or
            `normalise_inputs` with an encoder that divides by itself.

    Example::

        >>> predictor = Predictor(sne_fast.SNE(hidden_dim=32), target_names=["accuracy"], target_transform="logit")
        >>> predictor([torch.nn.Linear(4, 3), "mlp.safetensors"]).shape
        torch.Size([2, 1])
    """

    target_mean: Tensor
    target_std: Tensor

    __call__: Callable[..., Tensor]
    older_values: ClassVar = {"preparation": Preparation().config}

    def __init__(
        self,
        encoder: SNE,
        out_features: int = 1,
        hidden_features: Sequence[int] = (512, 512),
        target_names: Sequence[str] | None = None,
        target_transform: Transform = "identity",
        loss: Loss = "mse",
        normalise_inputs: bool | FittedScale = False,
        preparation: Preparation | None = None,
    ) -> None:
        super().__init__()
        if preparation is not None and not isinstance(preparation, Preparation):
            raise TypeError(f"Predictor: preparation must be a Preparation, got {type(preparation).__name__}")
        inner = unwrapped(encoder)
        if not isinstance(inner, SNE):
            raise TypeError(f"Predictor: encoder must be an sne_fast.SNE, got {type(inner).__name__}")
        choice("Predictor", "normalise_inputs", normalise_inputs, (False, True, *INPUT_SCALES))
        if normalise_inputs and inner.config["scale"] != "none":
            raise ValueError(
                f"Predictor: normalise_inputs needs an encoder with scale='none', got {inner.config['scale']!r}"
            )
        scale = "zoo" if normalise_inputs is True else normalise_inputs
        choice("Predictor", "target_transform", target_transform, TRANSFORMS)
        choice("Predictor", "loss", loss, LOSSES)
        if loss != "mse" and target_transform != "identity":
            raise ValueError(f"Predictor: loss {loss!r} takes target_transform 'identity', got {target_transform!r}")
        out_features = integer("Predictor", "out_features", out_features)
        hidden_features = integers("Predictor", "hidden_features", hidden_features, MAX_HIDDEN_LAYERS)
        names = _target_names(target_names, out_features)
        self.encoder = encoder
        self.head = PredictorHead(inner.out_features, out_features, hidden_features)
        self.out_features = out_features
        self.hidden_features = hidden_features
        self.target_names = names
        self.target_transform = target_transform
        self.loss = loss
        self.preparation = preparation or Preparation()
        self.input_scale = scale or None
        self.input_normaliser = INPUT_SCALES[scale]() if scale else None
        self.register_buffer("target_mean", torch.zeros(out_features))
        self.register_buffer("target_std", torch.ones(out_features))

    @property
    def _sne(self) -> SNE:
        encoder = unwrapped(self.encoder)
        assert isinstance(encoder, SNE)
        return encoder

    @property
    def in_features(self) -> int:
        """Width of the encodings that the head takes."""
        return self._sne.out_features

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name; the encoder as its own configuration."""
        return {
            "encoder": {**about(SNE), **self._sne.config},
            "out_features": self.out_features,
            "hidden_features": list(self.hidden_features),
            "target_names": list(self.target_names),
            "target_transform": self.target_transform,
            "loss": self.loss,
            "normalise_inputs": self.input_scale or False,
            "preparation": self.preparation.config,
        }

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> Predictor:
        encoder = config["encoder"]
        if not isinstance(encoder, dict):
            raise ValueError(f"encoder must be an object, got {shown(encoder)}")
        if saved_class(encoder) != "SNE":
            raise ValueError(f"encoder must be an SNE, its architectures say {shown(encoder.get('architectures'))}")
        try:
            made = SNE._from_config(checked_arguments(SNE, encoder))
        except ValueError as error:
            raise ValueError(f"encoder does not fit SNE: {error}") from error
        if config["target_names"] is None:  # would be made up, however many they are
            raise ValueError("target_names must be a list of names, got None")
        preparation = Preparation.from_config(config["preparation"])
        return cls(**{**config, "encoder": made, "preparation": preparation})

    def pack(self, networks: Networks, **options: Any) -> WeightBatch:
        """Pack networks as this predictor expects them: as its encoder and as its preparation say.

        Args:
            networks: modules, state_dicts or paths, or a zoo.
            options: further arguments of :func:`sne_fast.pack`.
        """
        batch = pack(networks, **{**self.pack_options, **options})
        if self._sne.tensor_statistics is not None and not self.preparation.odd:  # turned signs have others
            tensor_statistics(batch)
        return batch

    @property
    def pack_options(self) -> dict[str, Any]:
        """The arguments of :func:`sne_fast.pack` by which :meth:`pack` packs."""
        own = {"nonfinite": self.preparation.nonfinite, "kinds": self.preparation.kinds}
        return {**self._sne.pack_options, **own}

    def prepare(self, batch: WeightBatch) -> WeightBatch:
        """Do the steps of `preparation` that the batch does not say were done; `encode` does so by itself.

        A batch that is used often, as in training, is prepared once: the result says so in `prepared`, as do its parts,
        and keeps the statistics of its tensors, if the encoder takes any.

        Raises:
            SymmetryError: a canonical order of units is asked for, and a network's symmetries are not known.
            ValueError: the batch was prepared for another predictor.
        """
        batch = self.preparation.apply(batch)
        if self._sne.tensor_statistics is not None and batch.statistics is None:
            tensor_statistics(batch)  # of the weights as they were stored, which the input scale changes
        return batch

    def forward(self, networks: WeightBatch | Networks) -> Tensor:
        """Predict `(B, out_features)` in the targets' units; `networks` as for `encode`."""
        return self.denormalise(self.head(self.encode(networks)))

    def encode(self, networks: WeightBatch | Networks) -> Tensor:
        """Encode networks to the head's input `(B, encoder.out_features)`.

        Args:
            networks: networks, which are packed by `pack`, or a batch as `pack` gives it. Both are then prepared, of a
                batch that `prepare` or an augmentation has returned only what is left to do, and go through the input
                scale. So the values of a batch must not have been scaled.

        Raises:
            ValueError: as `pack`, `prepare` and the encoder.
        """
        return self.encoder(self.scale_inputs(networks if isinstance(networks, WeightBatch) else self.pack(networks)))

    def scale_inputs(self, batch: WeightBatch) -> WeightBatch:
        """Prepare a batch and apply the input scale, as `encode` does before the encoder.

        Raises:
            ValueError: as `prepare` and the input scale.
        """
        batch = self.prepare(batch)
        return batch if self.input_normaliser is None else self.input_normaliser(batch)

    def set_inputs(self, batch: WeightBatch) -> None:
        """Fit the input scale, and the mean and spread of statistics, to the training networks.

        Does nothing without `normalise_inputs` and for an encoder without statistics.
        """
        if self.fits_inputs:
            self.set_input_sums(self.input_sums(batch))

    @property
    def fits_inputs(self) -> bool:
        """Whether `set_inputs` sets anything."""
        return self.input_scale == "zoo" or self._sne.tensor_statistics is not None

    def input_sums(self, batch: WeightBatch) -> Tensor:
        """Return what `set_input_sums` takes, as one vector of float64 on the CPU.

        The vectors of several batches add up to that of all their networks.
        """
        batch = self.prepare(batch)
        scale = [] if self.input_normaliser is None else [self.input_normaliser.sums(batch)]
        return torch.cat([sums.flatten() for sums in (*scale, *self._sne.statistics_sums(batch))])

    def set_input_sums(self, sums: Tensor) -> None:
        """Do what `set_inputs` does, by what `input_sums` returned of the training networks."""
        if isinstance(self.input_normaliser, InputNormaliser):
            divisor = self.input_normaliser.divisor
            self.input_normaliser.set_sums(sums[: 2 * divisor.numel()].view(2, *divisor.shape))
            sums = sums[2 * divisor.numel() :]
        channel = self._sne.tensor_statistics
        columns = 0 if channel is None else len(channel.mean)
        self._sne.set_statistics_sums(sums[: 3 * columns].view(3, columns), sums[3 * columns :])

    def set_targets(self, targets: Tensor) -> None:
        """Set `target_mean` and `target_std` from training targets `(n, out_features)` in their own units.

        Raises:
            ValueError: another shape, values that are not finite, or targets outside what the loss takes.
        """
        transformed = self._transformed(targets).double()
        if self.loss != "mse":
            return
        self.target_mean.copy_(transformed.mean(0))
        std = transformed.std(0, correction=0)
        self.target_std.copy_(std.where(std > 0, torch.ones_like(std)))

    def normalise(self, targets: Tensor) -> Tensor:
        """Convert targets `(n, out_features)` in their own units to the head's; raises as `set_targets` does.

        Classes, `(n,)` integers for the loss "cross_entropy", stay as they are.
        """
        transformed = self._transformed(targets)
        if self.loss == "cross_entropy":
            return transformed.to(self.target_mean.device)
        return (transformed.to(self.target_mean) - self.target_mean) / self.target_std

    def losses(self, outputs: Tensor, goals: Tensor) -> Tensor:
        """Return the loss of each network `(n,)`: head outputs `(n, out_features)` against `normalise(targets)`."""
        if self.loss == "cross_entropy":
            return F.cross_entropy(outputs, goals, reduction="none")
        measure = F.mse_loss if self.loss == "mse" else F.binary_cross_entropy_with_logits
        return measure(outputs, goals, reduction="none").mean(1)

    def denormalise(self, outputs: Tensor) -> Tensor:
        """Convert head outputs `(n, out_features)` to the targets' units."""
        if self.loss == "cross_entropy":
            return outputs.softmax(1)
        values = outputs * self.target_std + self.target_mean
        if self.loss == "bce":
            return values.sigmoid()
        return values.sigmoid() if self.target_transform == "logit" else values

    def _transformed(self, targets: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return self._classes(targets)
        if targets.ndim != 2 or targets.shape[1] != self.out_features or targets.shape[0] == 0:
            raise ValueError(f"Predictor: targets must have shape (n, {self.out_features}), got {tuple(targets.shape)}")
        if not bool(targets.isfinite().all()):
            raise ValueError("Predictor: targets must be finite; leave out networks without one")
        if self.target_transform == "identity" and self.loss == "mse":
            return targets
        if bool((targets < 0).any()) or bool((targets > 1).any()):
            what = "the logit transform" if self.loss == "mse" else "the loss 'bce'"
            raise ValueError(
                f"Predictor: targets of {what} must lie in [0, 1], got {targets.min().item():g} to "
                f"{targets.max().item():g}"
            )
        if self.loss == "bce":
            return targets
        return targets.clamp(LOGIT_MARGIN, 1 - LOGIT_MARGIN).logit()

    def _classes(self, targets: Tensor) -> Tensor:
        if targets.ndim != 1 or targets.shape[0] == 0 or targets.dtype.is_floating_point or targets.dtype == torch.bool:
            raise ValueError(
                f"Predictor: targets of the loss 'cross_entropy' must be integers of shape (n,), got {targets.dtype} "
                f"{tuple(targets.shape)}"
            )
        if int(targets.min()) < 0 or int(targets.max()) >= self.out_features:
            raise ValueError(
                f"Predictor: classes must lie in 0..{self.out_features - 1}, got {int(targets.min())} to "
                f"{int(targets.max())}"
            )
        return targets.long()


def load_encoder(folder: str | PathLike[str], *, device: str | torch.device = "cpu") -> SNE | Predictor:
    """Load the `SNE` or `Predictor` that `save_pretrained` wrote, whichever it is.

    Args:
        folder: as the first argument of `SNE.from_pretrained`, which see also for the errors.
        device: where the parameters go.
    """
    kind = Predictor if saved_class(read_config(folder)) == "Predictor" else SNE
    return kind.from_pretrained(folder, device=device)
