"""Fingerprints of data, targets and configuration: what a training or a result was made of, and what differs now.

A fingerprint is a dict of plain values, which checkpoints and JSON files can hold. Data stands in it as a digest and a
few words about its size. `differences` compares the fingerprint of a file with that of a call.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..data.batch import WeightBatch
from ..nn.predictor import Predictor
from .digests import Digest, home_of, of_values, what_decides
from .settings import FitSettings
from .streams import NetworkStream

Fingerprint = dict[str, Any]
SETTINGS = "settings"
CONTINUED = ("epochs", "accumulate", "buckets", "capture")
"""Settings that may change when a training goes on, but not the product of `accumulate` and the processes."""
_MESSAGES = ("names", "skipped")  # fields of a batch that no number depends on
_VERSIONS = ("library_name", "sne_fast_version")  # entries of a configuration that do not decide what is computed
_MISSING = object()


def of_training(
    predictor: Predictor,
    networks: NetworkStream,
    settings: FitSettings,
    validation: NetworkStream | None = None,
    augment: Any = None,
    made_of: Mapping[str, Any] | None = None,
    *,
    processes: int = 1,
) -> Fingerprint:
    """Return the fingerprint of a training; arguments as for :func:`sne_fast.training.fit`.

    The parameters with which it starts are no part of it, since those of the checkpoint take their place. Nor are the
    device and how many processes share the parts of a step, on which only rounding depends.
    """
    return {
        "networks": dict(networks.fingerprint()),
        "targets": of_targets(networks.targets, predictor),
        "validation networks": None if validation is None else dict(validation.fingerprint()),
        "validation targets": None if validation is None else of_targets(validation.targets, predictor),
        "augmentation": None if augment is None else of_object(augment),
        SETTINGS: {
            **{k: v for k, v in dataclasses.asdict(settings).items() if k not in CONTINUED},
            "processes times accumulate": processes * settings.accumulate,
        },
        "predictor": of_predictor(predictor),
        **({} if made_of is None else {"made of": dict(made_of)}),
    }


def of_batch(batch: WeightBatch) -> Fingerprint:
    """Return the fingerprint of networks: their values, structure and types, not their names."""
    digest = Digest()
    for field in dataclasses.fields(batch):
        if field.init and field.name not in _MESSAGES:
            digest.add(field.name)
            digest.add(getattr(batch, field.name))
    return {"size": f"{len(batch)} networks of {batch.num_weights} weights", "sha256": digest.hex()}


def of_targets(targets: Tensor, predictor: Predictor | None = None) -> Fingerprint:
    """Return the fingerprint of targets, in the dtype in which the predictor takes them."""
    if predictor is not None and targets.dtype.is_floating_point:
        targets = targets.to(predictor.target_mean.dtype)
    return {"size": f"{'x'.join(str(n) for n in targets.shape)} numbers", "sha256": of_values(targets)}


def of_predictor(predictor: Predictor) -> Fingerprint:
    """Return the fingerprint of a predictor: its configuration, modules, and parameters' names, shapes and dtypes."""
    parameters = {name: (tuple(t.shape), str(t.dtype)) for name, t in predictor.state_dict().items()}
    frozen = [name for name, p in predictor.named_parameters() if not p.requires_grad]
    modules = [(name, what_decides(module)[0], module.extra_repr()) for name, module in predictor.named_modules()]
    return {
        **of_config(predictor.config),
        "class": type(predictor).__qualname__,
        "modules": {"size": f"{len(modules)} modules", "sha256": of_values(modules)},
        "parameters": {"size": f"{len(parameters)} tensors", "sha256": of_values(parameters)},
        "frozen parameters": {"size": f"{len(frozen)} tensors", "sha256": of_values(frozen)},
    }


def of_config(config: Mapping[str, Any]) -> Fingerprint:
    """Return the fingerprint of a configuration: its plain values by their places, without versions."""
    flat = _flat(json.loads(json.dumps(config, default=repr)))
    return {key: value for key, value in flat.items() if key.rpartition(".")[2] not in _VERSIONS}


def of_object(value: Any) -> Fingerprint:
    """Return the fingerprint of a function or of a callable object, such as an augmentation.

    It holds the digest of its code, and as "parts" one of each value that the code reads: attributes, arguments of a
    `functools.partial`, defaults, closures and globals, as deep as they go. Which of them change while it is used, as
    a counter does, `in_use` finds out.
    """
    code, values = what_decides(value)
    named = value.func if isinstance(value, functools.partial) else value
    home = {home_of(value), "__main__"}
    return {
        "size": getattr(named, "__qualname__", type(named).__qualname__),
        "sha256": of_values(code),
        "parts": {name: of_values(part, home) for name, part in values.items()},
        "in use": [],
    }


def in_use(fingerprint: Fingerprint, augment: Any) -> Fingerprint:
    """Return the fingerprint of a training without those values of its augmentation that have changed since."""
    about = fingerprint["augmentation"]
    if about is None or not about["parts"]:
        return fingerprint
    then, now = about["parts"], of_object(augment)["parts"]
    return _without(fingerprint, {name for name in {*then, *now} if then.get(name) != now.get(name)})


def as_recorded(now: Fingerprint, then: Fingerprint) -> Fingerprint:
    """Return the fingerprint of a call without the values that changed in use when `then` was recorded."""
    about, recorded = now["augmentation"], then["augmentation"]
    return now if None in (about, recorded) else _without(now, recorded["in use"])


def _without(fingerprint: Fingerprint, names: Iterable[str]) -> Fingerprint:
    about = fingerprint["augmentation"]
    changing = {*about["in use"], *names}
    parts = {name: digest for name, digest in about["parts"].items() if name not in changing}
    return {**fingerprint, "augmentation": {**about, "parts": parts, "in use": sorted(changing)}}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, as parts of a sentence.

    Example:
        >>> then = {"targets": {"size": "4x1 numbers", "sha256": "ab"}, "predictor": {"loss": "mse"}}
        >>> differences(then, {"targets": {"size": "4x1 numbers", "sha256": "cd"}, "predictor": {"loss": "bce"}})
        ['targets differ', "loss 'mse' then, 'bce' now"]
    """
    found = []
    for key in [*now, *(key for key in then if key not in now)]:
        one, other = then.get(key, _MISSING), now.get(key, _MISSING)
        if one == other:
            continue
        if _is_group(one) and _is_group(other):
            parts = differences(one, other)
            found += [f"other {key} ({'; '.join(parts)})"] if key == SETTINGS else parts
        elif _MISSING in (one, other) and (_is_group(one) or _is_group(other)):
            found.append(f"no record of {key} {'then' if one is _MISSING else 'now'}")
        elif _is_digest(one) or _is_digest(other):
            sizes = [_shown(value) for value in (one, other)]
            verb = "differ" if key.endswith("s") else "differs"
            found.append(f"{key} {verb}" + (f" ({sizes[0]} then, {sizes[1]} now)" if sizes[0] != sizes[1] else ""))
        else:
            found.append(f"{key} {_shown(one)} then, {_shown(other)} now")
    return found


def _is_digest(value: Any) -> bool:
    return isinstance(value, Mapping) and "sha256" in value


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and "sha256" not in value


def _shown(value: Any) -> str:
    if value is _MISSING or value is None:
        return "none"
    return f"{value.get('size')}" if _is_digest(value) else f"{value!r:.80}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
