"""Tests that compile csrc/cuda with nvcc for GPUs that are not there: warnings, registers, spills, instructions."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "csrc"), str(Path(__file__).parent)]  # cuda_build, cuda_compiled
