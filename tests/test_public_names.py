"""The public face: every name and subpackage is there on first use, and `import sne_fast` alone stays light."""

import ast
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sne_fast
from sne_fast import extras
from sne_fast.lazy import attach

INTERNAL = {"__main__", "atomic_files", "extras", "file_locks", "failures", "free_memory", "lazy", "regular_files"}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports_for_type_checkers(file):
    """Return the names that a package imports under `if TYPE_CHECKING:`, by module; "" holds submodules."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.level
        found.setdefault(node.module or "", []).extend(alias.name for alias in node.names)
    return found


def test_importing_the_package_imports_no_torch():
    light = "assert not {'torch', 'numpy', 'rich'} & set(sys.modules), sorted(sys.modules)"
    run(f"import sys, sne_fast.extras, sne_fast.cli.commands; sne_fast.__version__; dir(sne_fast); {light}")


def test_every_name_is_there_on_first_use():
    names = [*sne_fast.__all__, "zoo", "training", "reference", "functional", "symmetry"]
    by_attribute = "".join(f"sne_fast.{name}\n" for name in names)
    run(f"import sne_fast\n{by_attribute}")
    run(f"from sne_fast import {', '.join(reversed(names))}")


def test_names_submodules_and_version_are_listed():
    submodules = {module.name for module in pkgutil.iter_modules(sne_fast.__path__)} - INTERNAL
    submodules = {name for name in submodules if not name.startswith("_")}
    seen = run("import sne_fast; print(*dir(sne_fast))").split()
    assert submodules | set(sne_fast.__all__) | {"__version__"} <= set(seen)
    assert all(getattr(sne_fast, name).__name__ == f"sne_fast.{name}" for name in submodules)
    assert not hasattr(sne_fast, "nothing_of_the_kind")
    with pytest.raises(ImportError, match="cannot import name 'Snee'"):
        from sne_fast import Snee  # noqa: F401


def test_type_checkers_see_what_is_there():
    for_checkers = imports_for_type_checkers(sne_fast.__file__)
    submodules = for_checkers.pop("")
    assert sorted(name for names in for_checkers.values() for name in names) == sorted(sne_fast.__all__)
    assert set(submodules) | set(sne_fast.__all__) <= set(run("import sne_fast; print(*dir(sne_fast))").split())
    for module, names in for_checkers.items():
        home = __import__(f"sne_fast.{module}", fromlist=names)
        assert all(getattr(sne_fast, name) is getattr(home, name) for name in names)


@pytest.mark.parametrize("package", ["nn", "tasks", "training"])
def test_lazy_packages_give_what_type_checkers_see(package):
    module = getattr(sne_fast, package)
    for_checkers = imports_for_type_checkers(module.__file__)
    assert sorted(name for names in for_checkers.values() for name in names) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    assert all(hasattr(module, name) for name in module.__all__)


def test_star_import_and_pickle():
    names = {}
    exec("from sne_fast import *", names)
    assert set(sne_fast.__all__) <= set(names)
    encoder = names["SNE"](hidden_dim=32)
    before, after = encoder.state_dict(), pickle.loads(pickle.dumps(encoder)).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()


def test_a_name_is_looked_up_once():
    get, _ = attach("sne_fast", {".extras": ["install_command"]})
    try:
        assert get("install_command") is extras.install_command
        assert vars(sne_fast)["install_command"] is extras.install_command
    finally:
        del sne_fast.install_command
