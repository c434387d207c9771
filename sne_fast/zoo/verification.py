"""Verification of zoos: networks are rebuilt from their weights and run, and their results compared with the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import classifiers, family_zoo, inr_folders, inrs, mnist_inrs, schuerholt, unterthiner
from .rebuilding import compare
from .table import Zoo

_VERIFIERS: dict[str, Callable[..., list[tuple[float, str]]]] = {
    "classifiers": classifiers.verify,
    "families": family_zoo.verify,
    "sine_inrs": inrs.verify,
    "mnist_inrs": mnist_inrs.verify,
    "unterthiner": unterthiner.verify,
    "schuerholt": schuerholt.verify,
    "dwsnets": inr_folders.verify,
    "nfn": inr_folders.verify,
}
"""`about["source"]` of a zoo -> the function that knows how its networks are rebuilt."""


class VerifyError(ValueError):
    """Error of a network whose result differs from the table."""


def verify(zoo: Zoo, networks: Sequence[int] | None = None, *, tolerance: float | None = None, **data: Any) -> float:
    """Rebuild networks of a zoo from their weights, run them, and compare the results with the table.

    It finds errors that nothing else shows, such as a loader that transposes a kernel wrongly or a table whose rows are
    shifted: both leave the number of weights right.

    Args:
        zoo: of a maker or loader of this package, also after `save` and `Zoo.open`; or any zoo, with `build`, `measure`
            and `column`, see `compare`.
        networks: positions of the networks to check; all of them by default.
        tolerance: largest difference that is accepted; any by default.
        data: data that the zoo does not hold: `images` and `labels` for the zoos of Unterthiner and Schürholt, `images`
            for INRs of images; see `verify` in `unterthiner`, `schuerholt` and `inr_folders`.

    Returns:
        The largest difference found: of accuracies in [0, 1] for classifiers, of mean squared errors for INRs, of
        losses for zoos of `make_family_zoo`.

    Raises:
        VerifyError: a difference above `tolerance`; the message names the network.
        ValueError: weights that do not fit their architecture, a missing argument, or a zoo of unknown source.

    Example:
        >>> verify(zoo) < 0.002
        True
        >>> verify(load_unterthiner("svhn_cropped"), range(20), images=svhn_test, labels=svhn_labels) < 0.01
        True
    """
    chosen = range(len(zoo)) if networks is None else networks
    source = zoo.about.get("source")
    if "build" in data:
        found = compare(zoo, chosen, **data)
    elif source in _VERIFIERS:
        found = _VERIFIERS[source](zoo, chosen, **data)
    else:
        raise ValueError(
            f"verify: no way is known to rebuild networks of source {source!r}; give build=, measure= and column="
        )
    worst = max(found, default=(0.0, ""))
    if tolerance is not None and not worst[0] <= tolerance:
        raise VerifyError(f"verify: {worst[1]} differs by {worst[0]:.4g} from the table, more than {tolerance:.4g}")
    return worst[0]
