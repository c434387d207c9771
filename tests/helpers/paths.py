"""Where the repository stands, which tests of files outside the package read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
