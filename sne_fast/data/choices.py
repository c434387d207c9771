"""Values that options of packing take, as types; light enough for the help of the command line."""

from typing import Literal

Chunking = Literal["flat", "neuron", "kernel"]
Scale = Literal["tensor", "none"]
Order = Literal["names", "definition"]
NonFinite = Literal["raise", "zero", "keep"]
