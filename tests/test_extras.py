"""Optional packages: what is installed, and one sentence for what is not."""

import sys
import types

import pytest

from sne_fast.extras import install_command, installed, require


def test_modules_are_found_without_importing_them(monkeypatch):
    assert installed("json.tool") and "json.tool" not in sys.modules
    assert not installed("sne_fast_nowhere") and not installed("sne_fast_nowhere.inside")
    monkeypatch.setitem(sys.modules, "json.tool", None)
    assert not installed("json.tool")
    monkeypatch.setitem(sys.modules, "made_by_hand", types.ModuleType("made_by_hand"))
    assert installed("made_by_hand")


def test_require_names_what_is_missing_and_how_to_get_it(monkeypatch):
    require("json", "csv", extra="demo", why="the demo")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError) as error:
        require("json", "sklearn", "nowhere_at_all.inside", extra="demo", why="the demo", otherwise=", or less")
    assert str(error.value) == 'the demo needs scikit-learn, nowhere_at_all: pip install "sne_fast[demo]", or less'
    assert error.value.name == "sklearn"
    assert install_command("hub") == 'pip install "sne_fast[hub]"'


def test_tensorboard_is_asked_for_by_name(monkeypatch, tmp_path):
    from sne_fast.training import TensorBoardLog

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r'TensorBoardLog needs tensorboard: pip install "sne_fast\[tens'):
        TensorBoardLog(tmp_path)
