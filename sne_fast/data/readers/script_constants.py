"""Names of a frozen TorchScript program's constants, by the calls of its source that take them.

Freezing drops the names of modules. The constants are numbered in the order in which the program uses them, and the
source says as what: `torch.linear(x, CONSTANTS.c4, CONSTANTS.c5)`. Nothing of it is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["constant_names"]

_TOKEN = re.compile(
    r'CONSTANTS\.c(?P<constant>\d+)|(?P<call>[\w.]*)\(|(?P<list>\[)|(?P<end>[)\]])|(?P<next>,)|"[^"\n]*"|\n'
)
_AFTER_INPUT = {1: "weight", 2: "bias"}
_OPS: dict[str, tuple[str, dict[int, str]]] = {
    "linear": ("linear", _AFTER_INPUT),
    **{f"conv{d}d": (f"conv{d}d", _AFTER_INPUT) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": (f"conv_transpose{d}d", _AFTER_INPUT) for d in (1, 2, 3)},
    "_convolution": ("conv", _AFTER_INPUT),
    "batch_norm": ("batch_norm", {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}),
    "layer_norm": ("layer_norm", {2: "weight", 3: "bias"}),
    "group_norm": ("group_norm", {2: "weight", 3: "bias"}),
    "embedding": ("embedding", {0: "weight"}),
    "prelu": ("prelu", {1: "weight"}),
}  # by operation: the name of the layer, and the names of tensors by the place of the argument
_RECURRENT = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def constant_names(constants: Sequence[Any], sources: Iterable[str]) -> dict[int, str]:
    """Return a name for each constant, such as `4.linear.weight`; its layer has the number of its first tensor.

    A constant of which the source does not say what it is, is called `<number>.value`.

    Args:
        constants: with `ndim` where they are tensors.
        sources: texts of the program.
    """
    names: dict[int, str] = {}
    for text in sources:
        calls: list[tuple[str, int, dict[int, int]]] = []  # open calls: what, place of the argument, constants by place
        for token in _TOKEN.finditer(text):
            if token["call"] is not None or token["list"]:
                calls.append((token["call"] or "", 0, {}))
            elif token["constant"] and calls and len(token["constant"]) < 10:
                calls[-1][2].setdefault(calls[-1][1], int(token["constant"]))
            elif token["next"] and calls:
                calls[-1] = (calls[-1][0], calls[-1][1] + 1, calls[-1][2])
            elif token["end"] and calls:
                _name(*calls.pop(), constants, names)
            elif token[0] == "\n":
                calls.clear()
    return {i: names.get(i, f"{i}.value") for i in range(len(constants))}


def _name(call: str, last: int, taken: dict[int, int], constants: Sequence[Any], names: dict[int, str]) -> None:
    """Name the constants that one call or list takes, if none has a name yet."""
    if not taken or any(i in names or i >= len(constants) for i in taken.values()):
        return
    layer, roles = _OPS.get(call.removeprefix("torch."), ("", {}))
    first = min(taken.values())
    dims = [getattr(constants[i], "ndim", None) for i in taken.values()]
    if call == "" and len(taken) == last + 1 and dims == [2, 2, 1, 1] * (len(dims) // 4):  # of recurrent layers
        for place, i in taken.items():
            names[i] = f"{first}.rnn.{_RECURRENT[place % 4]}_l{place // 4}"
    elif set(taken) <= roles.keys():
        names.update({i: f"{first}.{layer}.{roles[place]}" for place, i in taken.items()})
