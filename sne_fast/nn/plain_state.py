"""The state of a module as a fresh module of its configuration would have it, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

_REMEDY = "merge, undo or replace what stands there, then save"
_SHOWN = 5


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile`, `DataParallel` and `DistributedDataParallel` were given."""
    while True:
        # By its name: importing torch._dynamo takes a second.
        inner = getattr(module, "_orig_mod", None) if type(module).__name__ == "OptimizedModule" else None
        if isinstance(inner, nn.Module):
            module = inner
        elif isinstance(module, (nn.DataParallel, DistributedDataParallel)):
            module = module.module
        else:
            return module


def plain_state(module: nn.Module, fresh: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `module` under the names that they have in `fresh`, in the order of its state_dict.

    Wrappers (see `unwrapped`) are left out wherever they stand. A parametrised tensor (`torch.nn.utils.parametrize`,
    `torch.nn.utils.parametrizations.weight_norm`) is the one that the module computes with.

    Args:
        module: the module to save.
        fresh: what its configuration builds, on any device.

    Raises:
        ValueError: the module computes something else than `fresh` would with any tensors: a submodule of another
            class, tensors too many, too few or of another shape, or tensors without values; the message names them.
    """
    found: dict[str, Tensor] = {}
    problems = list(_differences(module, fresh, "", found))
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"save_pretrained: this {type(fresh).__name__} cannot be saved so that from_pretrained reads the same: "
            f"{'; '.join(problems[:_SHOWN])}{more}; {_REMEDY}"
        )
    return _untied({name: found[name] for name in fresh.state_dict()})


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state whose tensors share no memory, since `fresh` ties none and a file keeps shared ones once."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _differences(module: nn.Module, fresh: nn.Module, path: str, found: dict[str, Tensor]) -> Iterator[str]:
    """Yield where `module` is not what `fresh` is, and put its tensors into `found`."""
    module = unwrapped(module)
    kind = parametrize.type_before_parametrizations(module)
    if kind is not type(fresh):
        yield f"{path or 'it'} is a {kind.__name__}, must be a {type(fresh).__name__}"
        return
    prefix = f"{path}." if path else ""
    own, wanted = _tensors(module), _tensors(fresh)
    alike = {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in wanted.items()}
    if alike and module.extra_repr() != fresh.extra_repr():
        yield f"{path or 'it'} is set to {module.extra_repr()}, must be set to {fresh.extra_repr()}"
    for name, tensor in wanted.items():
        value = own.pop(name, None)
        if value is None:
            yield f"{prefix}{name} is missing"
        elif value.shape != tensor.shape:
            yield f"{prefix}{name} must be {tuple(tensor.shape)}, is {tuple(value.shape)}"
        elif not value.is_floating_point():
            yield f"{prefix}{name} must be floating, is {value.dtype}"
        elif value.is_meta:
            yield f"{prefix}{name} is on the meta device and has no values"
        else:
            found[prefix + name] = value
    yield from (f"{prefix}{name} is unknown" for name in own)
    children = {n: c for n, c in module._modules.items() if c is not None and n != "parametrizations"}
    for name, child in fresh.named_children():
        if name in children:
            yield from _differences(children.pop(name), child, prefix + name, found)
        else:
            yield f"{prefix}{name} is missing"
    yield from (f"{prefix}{name} is unknown" for name in children)


@torch.no_grad()
def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own parameters and saved buffers by name, parametrised ones as they are computed with."""
    held = {**module._parameters, **module._buffers}
    own = {n: t.detach() for n, t in held.items() if t is not None and n not in module._non_persistent_buffers_set}
    if parametrize.is_parametrized(module):
        training = module.training
        module.eval()  # in training spectral_norm takes a step at every use
        own |= {name: getattr(module, name).detach() for name in module.get_submodule("parametrizations")._modules}
        module.train(training)
    return own
