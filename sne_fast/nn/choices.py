"""Values that options of the modules take, as types; light enough for the help of the command line."""

from typing import Literal

SetAttention = Literal["sab", "isab"]
Transform = Literal["identity", "logit"]
Loss = Literal["mse", "bce", "cross_entropy"]
Units = Literal["given", "canonical"]
FittedScale = Literal["zoo", "fan_in"]
Statistics = Literal["none", "tensor", "relative"]
