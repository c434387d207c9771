"""Compiled artefacts that outlive a session, found again by the content of what they are made from.

They stand in ``$SNE_FAST_TEST_CACHE``, by default ``~/.cache/sne_fast/tests``; of every kind the last few stay.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from helpers.paths import ROOT

KEPT = 4
"""Artefacts of a kind that stay when another one is made."""


def cache_folder() -> Path:
    if chosen := os.environ.get("SNE_FAST_TEST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sne_fast" / "tests"


def digest(texts: Iterable[str], files: Iterable[Path] = ()) -> str:
    """Return a hash of texts, in which the place of the repository does not count, and of files of the repository."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.replace(str(ROOT), "").encode() + b"\0")
    for file in sorted(files):
        found.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:24]


@functools.cache
def version(program: str) -> str:
    """Return what a compiler says of its version, "" if there is none."""
    path = shutil.which(program)
    return subprocess.run([path, "--version"], capture_output=True, text=True).stdout if path else ""


def native_sources(*folders: str) -> list[Path]:
    """Return all files below folders of ``csrc``, and the build scripts of ``csrc`` itself."""
    places = [*(ROOT / "csrc").glob("*.py"), *(path for f in folders for path in (ROOT / "csrc" / f).rglob("*"))]
    return [path for path in places if path.is_file() and "__pycache__" not in path.parts]


def kept(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of the artefact ``key``, which ``make(folder)`` fills unless it was kept.

    Processes that want the same one wait for the first. A folder that ``make`` did not finish is not kept.
    """
    place = cache_folder() / kind
    place.mkdir(parents=True, exist_ok=True)
    found = place / key
    with FileLock(place / f"{key}.lock"):
        if not found.exists():
            new = place / f"{key}.{os.getpid()}.new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            try:
                make(new)
                new.rename(found)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            others = (path for path in place.iterdir() if path.is_dir() and path.suffix != ".new" and path != found)
            for old in sorted(others, key=lambda path: path.stat().st_mtime)[: -KEPT + 1 or None]:
                shutil.rmtree(old, ignore_errors=True)
                old.with_name(f"{old.name}.lock").unlink(missing_ok=True)
    os.utime(found)
    return found
