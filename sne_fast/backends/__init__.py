"""Engines, one module each, found by :mod:`sne_fast._dispatch`; adding an engine adds a file here and touches none."""
