"""The version of the package, its one source: setuptools reads it from here without importing the package."""

__version__ = "0.1.0"
