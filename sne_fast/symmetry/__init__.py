"""Function-preserving permutations of hidden units: found, checked, and applied to packed batches in training.

    symmetry = sne_fast.symmetry.trace(net, example_inputs)         # or from_spec, chain_symmetry for a state_dict
    print(symmetry.explain())                                       # what is permuted, what is frozen and why
    error = sne_fast.symmetry.verify(net, example_inputs, symmetry) # relative change of the output, under 1e-5
    permuted = sne_fast.symmetry.permute(batch, symmetry)           # a WeightBatch, one gather
    sorted_ = sne_fast.symmetry.canonicalise(batch, symmetry)       # the same one for all permutations
    loss = task + weight * sne_fast.symmetry.logit_invariance(predictor, batch, permuted)

`terms` is the algebra of axes, `tracing` and `rules_*` find them in a module, `structure` says which permutations
depend on which axes, `core` is `Symmetry`, `plan` its index tables, `permuting` what training calls,
`canonical` the order of units that all permutations of a network share.
"""

from .canonical import CanonicalAugmentation, canonicalise
from .checking import verify
from .core import Group, Symmetry, SymmetryError
from .permuting import PermutationAugmentation, draw, logit_invariance, permute
from .spec import chain_symmetry, from_spec
from .tracing import trace
from .zoo import zoo_symmetries

__all__ = [
    "CanonicalAugmentation",
    "Group",
    "PermutationAugmentation",
    "Symmetry",
    "SymmetryError",
    "canonicalise",
    "chain_symmetry",
    "draw",
    "from_spec",
    "logit_invariance",
    "permute",
    "trace",
    "verify",
    "zoo_symmetries",
]
