"""The Kendall's tau that a perfect predictor of accuracies would reach, given that they are measured on few images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..reports.measures import measures, tau_above
from ..reports.paired import ABOVE
from .architectures import BY_SIDE
from .classifiers import LARGE_IMAGES
from .images import SIDE, load_images, side_of
from .rebuilding import load_weights
from .table import Zoo
from .vmapped import evaluate_together


def accuracy_ceiling(
    *zoos: Zoo, threshold: float = ABOVE, resamples: int = 20, seed: int = 0
) -> dict[str, float | None]:
    """Return the tau between the networks' accuracies on their test images and on bootstrap resamples of these images.

    A predictor that knew every network's accuracy on all images there are would still differ from the table, whose
    accuracies are those on a sample of images. The bootstrap takes the test images for all there are, and as many of
    them, drawn with replacement, for the sample. All networks of a zoo are measured on the same sample, as in a zoo.

    Args:
        zoos: parts of zoos of `make_classifier_zoo`, such as `zoo[test]`, each of one data set.
        threshold: the second tau is that of the networks whose accuracy on the sample is above it.
        resamples: number of samples that are drawn.
        seed: of the draws.

    Returns:
        "tau" and "tau_above", means over the samples; None where it is not defined.

    Raises:
        ValueError: no networks, or a zoo of another source.

    Example:
        >>> ceiling = accuracy_ceiling(zoo)
        >>> 0 < ceiling["tau"] <= 1
        True
    """
    hits = [image_hits(zoo).double() for zoo in zoos]
    if not sum(len(h) for h in hits):
        raise ValueError("accuracy_ceiling: needs networks, got none")
    known = torch.cat([h.mean(1) for h in hits]).numpy()
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float | None]] = {"tau": [], "tau_above": []}
    for _ in range(resamples):
        drawn = [_resampled(h, generator) for h in hits]
        sample = torch.cat(drawn).numpy()
        found["tau"].append(measures(known, sample)["tau"])
        found["tau_above"].append(tau_above(known, sample, threshold))
    return {name: _mean(values) for name, values in found.items()}


def _resampled(hits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the accuracies on as many images as there are, drawn with replacement."""
    images = hits.shape[1]
    return hits[:, torch.randint(images, (images,), generator=generator)].mean(1)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) and known else None


@torch.no_grad()
def image_hits(zoo: Zoo) -> Tensor:
    """Run the networks of a classifier zoo on the test images of their data set, all of an architecture at once.

    Args:
        zoo: of `make_classifier_zoo`, or a part of one.

    Returns:
        For each network and image, whether its largest logit is that of the label: `(n, images)` bool.

    Raises:
        ValueError: a zoo of another source, or a network that does not fit its architecture.
    """
    if zoo.about.get("source") != "classifiers":
        raise ValueError(f"image_hits: needs a zoo of make_classifier_zoo, got source {zoo.about.get('source')!r}")
    dataset = str(zoo.about["dataset"])
    side = side_of(dataset)
    images, labels = load_images(dataset)[1]
    hits = torch.zeros(len(zoo), len(labels), dtype=torch.bool)
    names = [str(name) for name in zoo.column("architecture")]
    for name in dict.fromkeys(names):
        places = [i for i, own in enumerate(names) if own == name]
        base = BY_SIDE[side][name]()
        states = []
        for i in places:
            states.append(zoo.state_dict(i))
            load_weights(base, states[-1], zoo.rows[i])
        stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
        params = {key: stacked[key] for key, _ in base.named_parameters()}
        buffers = {key: stacked[key] for key, _ in base.named_buffers()}
        logits = evaluate_together(base, params, buffers, images, None if side == SIDE else LARGE_IMAGES)
        hits[places] = logits.argmax(2) == labels
    return hits
