"""Function-preserving permutations of hidden units: found, checked, and applied to packed batches in training.

Finding and checking:
    `trace` finds the permutations of a module; `from_spec` and `chain_symmetry` serve where there is only a state_dict;
    `verify` compares outputs before and after a permutation.
In training:
    `permute` permutes a batch, `canonicalise` sorts its units, `PermutationAugmentation` and `CanonicalAugmentation` do
    so for every batch, and `logit_invariance` is a loss.

Example:
    >>> import torch
    >>> import sne_fast
    >>> from sne_fast import symmetry
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> found = symmetry.trace(net, torch.randn(2, 4))
    >>> print(found.explain())
    Sequential: 1 groups, 10^4.6 permutations
      permuted  8 units: 0.weight[0]
                with 0.bias[0], 2.weight[1]
      frozen    input: 0.weight[1]
      frozen    output: 2.weight[0], 2.bias[0]
    >>> error = symmetry.verify(net, torch.randn(2, 4), found)  # relative change of the output, under 1e-5
    >>> permuted = symmetry.permute(sne_fast.pack([net]).detach(), found)

The modules from the bottom up: `terms` is the algebra of axes; `boxes` and `structure` say where axes stand and which
permutations depend on which axes; `core` is `Symmetry`, with its index tables in `gather`. `tracer` and `rules` label
the tensors of a running module, for `finding`, `checking` and `tracing`. `permuting` and `canonical` change batches.
"""

from .boxes import SymmetryError
from .canonical import CanonicalAugmentation, canonicalise
from .chain import chain_symmetry
from .checking import verify
from .core import Group, Symmetry
from .invariance import logit_invariance
from .permuting import PermutationAugmentation, draw, permute
from .tracing import trace
from .zoo import zoo_symmetries

from_spec = Symmetry.from_spec

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
