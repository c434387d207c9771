"""Models saved and loaded in the Hugging Face Hub's layout: `model.safetensors` beside `config.json`."""

from __future__ import annotations

import copy
import hashlib
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
from ..data.checkpoints import CheckpointError, load_state_dict, save_state_dict
from ..data.devices import usable_device
from ..extras import require
from ..regular_files import FileError, open_regular, parse_json, read_json
from ..version import __version__
from .config_checks import shortened, shown
from .plain_state import plain_state

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
DIGEST = "weights_sha256"
ABOUT = ("architectures", "library_name", "sne_fast_version", DIGEST)
"""Keys of `config.json` that are not constructor arguments."""

SHIPPED = Path(__file__).resolve().parents[1] / "models"
"""Folder of the models that come with the package, by their names."""

T = TypeVar("T", bound="PretrainedMixin")

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 5


class PretrainedMixin:
    """Mixin that saves and loads an `nn.Module` whose `config` is a dict of its constructor's arguments.

    `config.json` holds those arguments beside `architectures` (the class's name in a list, as transformers writes it),
    `library_name`, `sne_fast_version` and `weights_sha256`, the SHA-256 of `model.safetensors`, by which a loader tells
    that the two files belong together; files written without it are taken as they are.

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
        """Build the module from the constructor's arguments as `checked_arguments` returns them."""
        return cls(**config)

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` into a folder, made if missing.

        Both files are written elsewhere first and then moved, so that a failure leaves what was there before, and a
        program killed between the moves leaves two files that `from_pretrained` knows not to belong together. What
        wraps the module or a part of it (`torch.compile`, `DataParallel`, `DistributedDataParallel`) is left out, and
        parametrised tensors are written as they are computed with. An encoder with such a part computes its products in
        another order than the plain one that is loaded, so that the last bits of its numbers may differ.

        Raises:
            ValueError: `from_pretrained` would not give the same module: a part was replaced by one of another class,
                a tensor is missing, unknown or of another shape (the message names it), or the configuration is one
                that the class or JSON does not take.
            OSError: the folder cannot be written.
        """
        assert isinstance(self, nn.Module)
        cls = type(self)
        text = _config_text(cls, self.config)
        fresh = _build(cls, parse_json(text, CONFIG_NAME, dict), f"save_pretrained: the config of {cls.__name__}")
        state = plain_state(self, fresh)
        target = Path(save_directory).resolve()
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"save_pretrained: {target} is a file; give a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with filling(target) as stage:
            try:
                save_state_dict(state, stage / WEIGHTS_NAME, metadata={"format": "pt"})
            except CheckpointError as error:  # which names a file that is gone by now
                raise CheckpointError(str(error).replace(str(stage), str(target))) from error
            content = {**about(cls), DIGEST: _sha256(stage / WEIGHTS_NAME), **self.config}
            (stage / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

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
        """Load a model that `save_pretrained` wrote, in evaluation mode, each tensor in the dtype it was saved in.

        Shapes are compared with those in the file before any tensor is made or read.

        Args:
            pretrained_model_name_or_path: a folder that holds a model, the name of a model that comes with the package
                ("sne-small"), or a repository id `user/name` of the Hub, which needs `huggingface_hub`; what is first
                of these counts.
            device: where the parameters go.
            revision: branch, tag or commit of the repository; as the rest, ignored for others.
            cache_dir, force_download, local_files_only, token: as in `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError: no such folder, or a file is missing in it.
            ValueError: another class's model, arguments that are unknown, missing or out of range, tensors that do not
                fit, weights that the configuration was not written with, a broken file, a device that cannot be used.
            ModuleNotFoundError: a repository id was given and `huggingface_hub` is missing.
            OSError: the repository could not be read.
        """
        name, device = os.fspath(pretrained_model_name_or_path), usable_device(device)
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        config = read_config(name, **hub)
        writer = saved_class(config)
        if writer != cls.__name__:
            holds = f"{CONFIG_NAME} names no class" if writer is None else f"holds a {shortened(writer)}"
            raise ValueError(f"from_pretrained: {name!r}: {holds}, expected {cls.__name__}")
        digest = config.get(DIGEST)
        if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise ValueError(
                f"from_pretrained: {CONFIG_NAME} of {name!r}: {DIGEST} must be 64 hexadecimal digits, got "
                f"{shown(digest)}"
            )
        version = shown(config.get("sne_fast_version", "unknown"))
        module = _build(cls, config, f"from_pretrained: {CONFIG_NAME} of {name!r} (written by sne_fast {version})")
        _load_weights(module, _find(name, WEIGHTS_NAME, hub), name, digest)
        loaded: T = module.to(device).eval()
        return loaded

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


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG_NAME}"))


def described(model: PretrainedMixin) -> dict[str, Any]:
    """Return what `config.json` of a saved model says, with the digest of its weights."""
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)
        return read_config(made)


def about(cls: type) -> dict[str, Any]:
    """Return the entries of `config.json` beside the constructor's arguments."""
    return {"architectures": [cls.__name__], "library_name": "sne_fast", "sne_fast_version": __version__}


def saved_class(config: Mapping[str, Any]) -> str | None:
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
        config: dict[str, Any] = read_json(path, dict)
    except FileError as error:
        raise ValueError(f"from_pretrained: {error}") from error
    return config


def checked_arguments(cls: type[PretrainedMixin], config: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments in the contents of a `config.json`, those older than it filled in.

    Raises:
        ValueError: some are unknown or missing; the message says which.
    """
    expected = set(inspect.signature(cls).parameters)
    given = {key: value for key, value in config.items() if key not in ABOUT}
    found = {**copy.deepcopy({k: v for k, v in cls.older_values.items() if k not in given}), **given}
    # An argument left out would silently become today's default, which need not be what was trained.
    problems = [
        f"{what} {', '.join(sorted(shortened(key) for key in keys))}"
        for what, keys in (("unknown", set(found) - expected), ("missing", expected - set(found)))
        if keys
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _config_text(cls: type, config: dict[str, Any]) -> str:
    try:
        return json.dumps({**about(cls), **config}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_pretrained: the config of {cls.__name__} is not JSON: {error}") from error


def _build(cls: type[T], config: dict[str, Any], what: str) -> Any:
    """Return the module of a configuration on the meta device, where it costs no memory.

    Raises:
        ValueError: the configuration does not fit; the message begins with `what`.
    """
    try:
        with torch.device("meta"):
            return cls._from_config(checked_arguments(cls, config))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} does not fit {cls.__name__}: {error}") from error


def _load_weights(module: nn.Module, path: Path, name: str, digest: str | None) -> None:
    """Load the file of weights into a module on the meta device; its tensors become those of the file."""
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = _shapes_in(path)
    problems = [
        *(f"missing {key}" for key in wanted if key not in found),
        *(f"unknown {shortened(key)}" for key in found if key not in wanted),
        *(
            f"{key} must be {shape}, got {found[key]}"
            for key, shape in wanted.items()
            if key in found and shape != found[key]
        ),
    ]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"from_pretrained: {WEIGHTS_NAME} of {name!r} does not fit {type(module).__name__}: "
            f"{'; '.join(problems[:_SHOWN])}{more}"
        )
    if digest is not None and _sha256(path) != digest:
        raise ValueError(
            f"from_pretrained: {WEIGHTS_NAME} of {name!r} is not the file that {CONFIG_NAME} was written with, its "
            f"SHA-256 differs: a save was interrupted or one of them replaced; save the model again, or remove "
            f"{DIGEST} from {CONFIG_NAME} if they do belong together"
        )
    tensors = load_state_dict(path)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"from_pretrained: {WEIGHTS_NAME} of {name!r}: {key} must be floating, is {tensor.dtype}")
    # Copies, since a tensor of a large file may be mapped, and would change with the file.
    module.load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, assign=True)


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    open_regular(path).close()
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"from_pretrained: {path} is damaged or no safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _find(name: str, filename: str, hub: dict[str, Any]) -> Path:
    """Return the file in the folder `name`, else of the shipped model, else download it from the repository."""
    files = (os.path.join(name, file) for file in (CONFIG_NAME, WEIGHTS_NAME))
    if name in shipped_models() and not any(map(os.path.exists, files)):
        return SHIPPED / name / filename
    if os.path.isdir(name):
        path = Path(name) / filename
        if not path.is_file():
            raise FileNotFoundError(f"from_pretrained: folder {name!r} holds no {filename}")
        return path
    if not _REPO_ID.fullmatch(name) or os.path.exists(name):
        raise FileNotFoundError(
            f"from_pretrained: {name!r} is neither a folder nor a repository id of the Hub, nor one of the package's "
            f"models: {', '.join(shipped_models())}"
        )
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
