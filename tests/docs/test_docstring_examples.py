"""Every example in the package's docstrings runs and prints what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import io
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import sne_fast
from helpers.lazy_names import LazyNames

PACKAGE = Path(sne_fast.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
EXAMPLE = re.compile(r"^\s*Examples?::?\s*$", re.M)


def modules() -> list[str]:
    """Return the names of all modules of the package, found without importing them."""
    names = [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "sne_fast.")]
    return ["sne_fast", *(name for name in names if not name.endswith("__main__"))]


def docstrings(name: str) -> list[tuple[str, str, int]]:
    """Return qualified name, text and line of every docstring in the source of a module."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    if not spec.origin.endswith(".py"):
        return []
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found: list[tuple[str, str, int]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                found.append((prefix, text, node.body[0].lineno))
        for child in ast.iter_child_nodes(node):
            inner = getattr(child, "name", None) if not isinstance(child, (ast.alias, ast.ExceptHandler)) else None
            visit(child, f"{prefix}.{inner}" if inner else prefix)

    visit(tree, name)
    return found


DOCSTRINGS = [(module, *found) for module in modules() for found in docstrings(module)]
WITH_EXAMPLES = [found for found in DOCSTRINGS if doctest.DocTestParser().get_examples(found[2])]


@pytest.mark.parametrize(("module", "name", "text", "line"), WITH_EXAMPLES, ids=[found[1] for found in WITH_EXAMPLES])
def test_example(module: str, name: str, text: str, line: int, docstring_names: LazyNames) -> None:
    imported = _import(module)
    package = importlib.import_module(imported.__package__ or module)
    public = {key: getattr(package, key) for key in getattr(package, "__all__", ())}
    # Public names of the package come before names of the module itself.
    for namespace in (public, vars(imported)):
        for key, value in namespace.items():
            if not key.startswith("__") and key not in docstring_names.makers:
                docstring_names.setdefault(key, value)
    test = doctest.DocTestParser().get_doctest(text, {}, name, imported.__file__, line - 1)
    test.globs = docstring_names
    out = io.StringIO()
    failed = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=out.write, clear_globs=False).failed
    assert not failed, out.getvalue()


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:  # an optional package is missing here
        pytest.skip(f"{module}: {error}")


def test_examples_can_be_run() -> None:
    shown = [found for found in DOCSTRINGS if EXAMPLE.search(found[2])]
    without = [name for _, name, text, _ in shown if not doctest.DocTestParser().get_examples(text)]
    assert not without, f"an example must be a doctest, with >>> before every line: {', '.join(without)}"


def test_public_names_have_examples() -> None:
    examples = {name for _, name, _, _ in WITH_EXAMPLES}
    for name in ("SNE", "pack", "WeightBatch", "MAB", "SAB", "ISAB", "PMA"):
        public = getattr(sne_fast, name)
        assert f"{public.__module__}.{public.__qualname__}" in examples, name
        assert inspect.getdoc(public)
