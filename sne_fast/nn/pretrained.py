"""Models saved and loaded in the Hugging Face Hub's layout: `model.safetensors` beside `config.json`."""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..atomic_files import filling
from ..data.checkpoints import load_state_dict, save_state_dict
from ..extras import require
from ..version import __version__

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
ABOUT = ("architectures", "library_name", "sne_fast_version")
"""Keys of `config.json` that are not constructor arguments."""

T = TypeVar("T", bound="PretrainedMixin")

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class PretrainedMixin:
    """Mixin that saves and loads an `nn.Module` whose `config` is a dict of its constructor's arguments.

    `config.json` holds those arguments beside `architectures` (the class's name in a list, as transformers writes it),
    `library_name` and `sne_fast_version`.

        encoder.save_pretrained("encoder")
        encoder = sne_fast.SNE.from_pretrained("encoder")          # or "user/name" on the Hub

    Attributes:
        older_values: the value that each option had before it could be chosen; a configuration without it means that.
    """

    older_values: ClassVar[Mapping[str, Any]] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as values that JSON can hold."""
        raise NotImplementedError(f"{type(self).__name__} must define config")

    @classmethod
    def _from_config(cls: type[T], config: dict[str, Any]) -> T:
        """Build the module from the constructor's arguments as they stood in `config.json`."""
        return cls(**{**cls.older_values, **config})

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` into a folder, made if missing.

        Both files are written elsewhere first and then moved, so that a failure leaves what was there before.

        Raises:
            ValueError: the configuration cannot be held by JSON.
            OSError: the folder cannot be written.
        """
        assert isinstance(self, nn.Module)
        try:
            config = json.dumps({**about(type(self)), **self.config}, indent=2)
        except TypeError as error:
            raise ValueError(f"save_pretrained: the config of {type(self).__name__} is not JSON: {error}") from error
        target = Path(save_directory).resolve()
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"save_pretrained: {target} is a file; give a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with filling(target) as stage:
            save_state_dict(self.state_dict(), stage / WEIGHTS_NAME, metadata={"format": "pt"})
            (stage / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> T:
        """Load a model that `save_pretrained` wrote, in evaluation mode and in the dtype it was saved in.

        Args:
            pretrained_model_name_or_path: a folder, or a repository id `user/name` of the Hub, which needs
                `huggingface_hub`. A folder of that name comes first.
            device: where the parameters go.
            revision: branch, tag or commit of the repository; as the rest, ignored for a folder.
            cache_dir, force_download, local_files_only, token: as in `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError: no such folder, or a file is missing in it.
            ValueError: another class's model, unknown or missing arguments, tensors that do not fit, a broken file.
            ModuleNotFoundError: a repository id was given and `huggingface_hub` is missing.
            OSError: the repository could not be read.
        """
        name = os.fspath(pretrained_model_name_or_path)
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        config = read_config(name, **hub)
        check_config(cls, config, name)
        try:
            module = cls._from_config(arguments(config))
        except TypeError as error:
            raise ValueError(
                f"from_pretrained: {CONFIG_NAME} of {name!r} does not fit {cls.__name__}: {error}"
            ) from error
        assert isinstance(module, nn.Module)
        _load_weights(module, _find(name, WEIGHTS_NAME, hub), name)
        return module.to(device).eval()

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, commit_message: str = ""
    ) -> str:
        """Upload the model to the Hub, making the repository if needed; returns the address of the commit.

        Raises:
            ModuleNotFoundError: `huggingface_hub` is missing.
        """
        api = _hub(f"push_to_hub: uploading to {repo_id!r}").HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            message = commit_message or f"Push {type(self).__name__} using sne_fast"
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def about(cls: type) -> dict[str, Any]:
    """Return the entries of `config.json` beside the constructor's arguments."""
    return {"architectures": [cls.__name__], "library_name": "sne_fast", "sne_fast_version": __version__}


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments in the contents of a `config.json`."""
    return {key: value for key, value in config.items() if key not in ABOUT}


def saved_class(config: dict[str, Any]) -> str | None:
    """Return the name of the class that wrote this `config.json`, None if it does not say."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and len(names) == 1 else None


def read_config(pretrained_model_name_or_path: str | PathLike[str], **hub: Any) -> dict[str, Any]:
    """Read `config.json` of a folder or a repository of the Hub; `hub` as in `PretrainedMixin.from_pretrained`.

    Raises:
        FileNotFoundError, ModuleNotFoundError, OSError: as `PretrainedMixin.from_pretrained`.
        ValueError: the file is not a JSON object.
    """
    path = _find(os.fspath(pretrained_model_name_or_path), CONFIG_NAME, hub)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also covers bytes that are not UTF-8
        raise ValueError(f"from_pretrained: {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"from_pretrained: {path} must hold a JSON object, got {type(config).__name__}")
    return config


def check_config(cls: type[PretrainedMixin], config: dict[str, Any], name: str) -> None:
    """Check that `cls` wrote the configuration and that it holds its constructor's arguments, except `older_values`.

    Raises:
        ValueError: it does not; the message says what is unknown or missing.
    """
    writer = saved_class(config)
    if writer != cls.__name__:
        holds = f"{CONFIG_NAME} names no class" if writer is None else f"holds a {writer}"
        raise ValueError(f"from_pretrained: {name!r}: {holds}, expected {cls.__name__}")
    expected = set(inspect.signature(cls).parameters)
    given = set(arguments(config))
    # An argument left out would silently become today's default, which need not be what was trained.
    problems = [
        f"{what} {', '.join(sorted(keys))}"
        for what, keys in (("unknown", given - expected), ("missing", expected - given - set(cls.older_values)))
        if keys
    ]
    if problems:
        version = config.get("sne_fast_version", "unknown")
        raise ValueError(
            f"from_pretrained: {CONFIG_NAME} of {name!r} (written by sne_fast {version}) does not fit {cls.__name__}: "
            f"{'; '.join(problems)}"
        )


def _load_weights(module: nn.Module, path: Path, name: str) -> None:
    found = load_state_dict(path)
    wanted = module.state_dict()
    problems = [
        *(f"missing {key}" for key in wanted if key not in found),
        *(f"unknown {key}" for key in found if key not in wanted),
        *(
            f"{key} must be {tuple(wanted[key].shape)}, got {tuple(found[key].shape)}"
            for key in wanted
            if key in found and wanted[key].shape != found[key].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"from_pretrained: {WEIGHTS_NAME} of {name!r} does not fit {type(module).__name__}: "
            f"{'; '.join(problems[:5])}{more}"
        )
    dtypes = {t.dtype for t in found.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        module.to(dtypes.pop())
    module.load_state_dict(found)


def _find(name: str, filename: str, hub: dict[str, Any]) -> Path:
    """Return the file in the folder `name`, else download it from the repository of that name."""
    if os.path.isdir(name):
        path = Path(name) / filename
        if not path.is_file():
            raise FileNotFoundError(f"from_pretrained: folder {name!r} holds no {filename}")
        return path
    if not _REPO_ID.fullmatch(name) or os.path.exists(name):
        raise FileNotFoundError(f"from_pretrained: {name!r} is neither a folder nor a repository id of the Hub")
    hub_module = _hub(f"from_pretrained: {name!r} is not a folder here, and reading it from the Hub")
    try:
        return Path(hub_module.hf_hub_download(name, filename, **hub))
    except Exception as error:  # the client's errors differ between its versions and HTTP libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"from_pretrained: {name!r} is not a folder here, and {filename} could not be read from the Hub: {reason}"
        ) from error


def _hub(why: str) -> Any:
    require("huggingface_hub", extra="hub", why=why)
    import huggingface_hub

    return huggingface_hub
