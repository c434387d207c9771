"""Model zoos: many trained networks with what is known about each."""

from .digits import make_digits_zoo, verify
from .table import Zoo, ZooWriter

__all__ = ["Zoo", "ZooWriter", "make_digits_zoo", "verify"]
