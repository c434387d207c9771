"""Before torch is loaded: OpenMP's waiting threads sleep, so that tests are not slowed by whatever else runs."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
