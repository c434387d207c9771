"""Backends: each folder here with a file ``backend.py`` is one, so that adding a backend adds files and touches none.

The other modules serve several backends. See :class:`sne_fast.ops.backend.Backend` for what ``backend.py`` declares.
"""
