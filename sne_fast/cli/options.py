"""Options of a command, made from the dataclass of its settings.

:mod:`sne_fast.tasks.settings` says what metadata a field may have. Names, types, choices, defaults and help of the
options thus stand once, in the settings class, which checks values however they come.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

Settings = TypeVar("Settings")

_TAG = re.compile(r"(\\*)(\[[a-z#/@][^[]*?])")


def options_of(settings: type[Settings]) -> Callable[[Callable[[Settings], None]], Callable[..., None]]:
    """Return a decorator that gives a command an option per described field of `settings`.

    The command itself takes one argument, the settings. Help is shown as it is written, without rich's markup.
    """
    hints = get_type_hints(settings)
    described = [field for field in dataclasses.fields(settings) if "help" in field.metadata]  # type: ignore[arg-type]
    parameters = [_parameter(field, hints[field.name]) for field in described]

    def decorate(command: Callable[[Settings], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            # A repeatable option that was not given is None (an empty list in some versions of typer).
            repeatable = {field.name for field in described if _item_type(hints[field.name])}
            given = {name: value for name, value in values.items() if name not in repeatable}
            given |= {name: tuple(values[name]) for name in repeatable if values[name]}
            command(settings(**given))

        run.__doc__ = _as_written(inspect.getdoc(command) or "")
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _as_written(text: str) -> str:
    """Return text that rich shows as it is, by the rule of `rich.markup.escape` but without importing rich."""
    return _TAG.sub(r"\1\1\\\2", text)


def _item_type(hint: Any) -> Any:
    """Return the type of a repeatable field's items, `int` for `tuple[int, ...]`; None for other fields."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """Return the parameter that typer reads: `name: Annotated[type, Option(...)] = default`."""
    about, item = field.metadata, _item_type(hint)
    required = field.default is dataclasses.MISSING
    shown: dict[str, Any] = {"help": _as_written(about["help"]), "min": about.get("min"), "max": about.get("max")}
    shown["show_default"] = about.get("shown", not required and item is None)
    if about.get("argument"):
        info = typer.Argument(metavar=about.get("metavar"), **shown)
    else:
        info = typer.Option(*about.get("flags", (f"--{field.name.replace('_', '-')}",)), **shown)
    kind, default = hint, field.default
    if item is not None:
        kind, default = (list[item], None) if required else (list[item] | None, None)  # type: ignore[valid-type]
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind, info],
    )
