"""Tests that compile kernels for GPUs that are not there: registers, spills, shared memory, matrix instructions.

``pytest tests/backends/triton/compiled`` compiles a representative set, with ``--all-variants`` all, sm_120 too.
"""

import importlib.util
import os

# Under the interpreter's switch a kernel is no compilable function.
COMPILING = os.environ.get("TRITON_INTERPRET") != "1" and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if COMPILING else ["test_*.py"]
