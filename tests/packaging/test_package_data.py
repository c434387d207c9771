"""Files of the package that are no modules reach the wheel."""

from pathlib import PurePosixPath

import pytest

from helpers.paths import ROOT


def test_every_file_beside_the_modules_is_listed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    package = ROOT / "sne_fast"
    files = [file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()]
    built = (".py", ".pyc", ".so", ".dll", ".dylib", "_build_error.txt")
    data = [file for file in files if not file.endswith(built)]
    assert "similarity/templates/page.html" in data

    def matches(file, pattern):
        return PurePosixPath(file).match(pattern) and file.count("/") == pattern.count("/")

    missing = [file for file in data if not any(matches(file, pattern) for pattern in listed["sne_fast"])]
    assert not missing, f"pyproject.toml, package-data: {', '.join(missing)}"
