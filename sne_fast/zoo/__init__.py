"""Model zoos: many trained networks with what is known about each.

Made here: `make_digits_zoo`, `make_classifier_zoo`, `make_sine_zoo`, `make_mnist_inr_zoo`,
`make_family_zoo`. Read from what others
published: `load_unterthiner`, `load_schuerholt`, `load_dwsnets`, `load_nfn`, and `load_checkpoints` for a folder of
your own. All give a `Zoo`; `verify` runs its networks again, `zoo.save(folder)` writes it, `Zoo.open(folder)` reads it.
"""

from .ceilings import accuracy_ceiling
from .checkpoint_folder import load_checkpoints
from .classifiers import make_classifier_zoo
from .dataset import WeightBudgetSampler, ZooDataset, pack_options, zoo_loader
from .digits import make_digits_zoo
from .family_zoo import make_family_zoo
from .inr_folders import load_dwsnets, load_nfn
from .inrs import make_sine_zoo
from .mnist_inrs import make_mnist_inr_zoo
from .pretraining_zoo import make_pretraining_zoo
from .schuerholt import load_schuerholt
from .shards import ZooWriter
from .table import Zoo, ZooNetwork, networks_at
from .unterthiner import load_unterthiner
from .verification import VerifyError, verify

__all__ = [
    "VerifyError",
    "WeightBudgetSampler",
    "Zoo",
    "ZooDataset",
    "ZooNetwork",
    "ZooWriter",
    "accuracy_ceiling",
    "load_checkpoints",
    "load_dwsnets",
    "load_nfn",
    "load_schuerholt",
    "load_unterthiner",
    "make_classifier_zoo",
    "make_digits_zoo",
    "make_family_zoo",
    "make_mnist_inr_zoo",
    "make_pretraining_zoo",
    "make_sine_zoo",
    "networks_at",
    "pack_options",
    "verify",
    "zoo_loader",
]
