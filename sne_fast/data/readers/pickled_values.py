"""Values of a pickle, made without calling anything that the pickle names.

The opcodes of the pickle are decoded by `pickletools` of the standard library and applied to plain Python values here.
A name (`module.attribute`) is never looked up in a module: it stands for a function of the reader, which checks its
arguments, or for nothing, and then the objects made with it are `Placeholder`s. They keep what the pickle gave them, so
that tensors inside can be found, and can do nothing. No list of torch or of the program has a say in it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

from .errors import shown

__all__ = ["BadPickle", "Name", "Placeholder", "RefusedName", "read_pickle"]

MAX_OPCODES = 20_000_000
_MAX_LINE = 2**20
_MAX_KEY = 16  # entries of a tuple that is a key


class BadPickle(Exception):
    """Bytes that are no pickle, or make no sense as one; the message ends a sentence."""


class RefusedName(Exception):
    """A pickle that uses a name which the reader does not know; the argument is the name."""


class Name:
    """A name in a pickle that stands for nothing, or, with `function`, for a function of the reader."""

    __slots__ = ("function", "path")

    def __init__(self, path: str, function: Callable[..., Any] | None = None) -> None:
        self.path, self.function = path, function

    def __repr__(self) -> str:
        return self.path


class Placeholder:
    """An object of a pickle that was not made: its class's name, and what the pickle gave it."""

    __slots__ = ("arguments", "entries", "items", "path", "state")

    def __init__(self, path: str, arguments: tuple[Any, ...] = ()) -> None:
        self.path, self.arguments = path, arguments
        self.state: Any = None
        self.items: dict[Any, Any] = {}
        self.entries: list[Any] = []


def read_pickle(
    stream: IO[bytes],
    known: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
    *,
    strict: bool = False,
) -> Any:
    """Return the value of the pickle at the stream's place, which ends behind it.

    Args:
        stream: the bytes; `read` and `readline` must not wait for more than the stream has.
        known: what names stand for: a callable, called with the arguments of the pickle, or any other value.
        persistent: what makes a value of a persistent id.
        strict: refuse unknown names and opcodes that torch does not write, instead of making placeholders.

    Raises:
        BadPickle: no pickle, a truncated one, or one of too many opcodes.
        RefusedName: with `strict`, a name that is not known.
        Exception: whatever the functions in `known` and `persistent` raise.
    """
    return _Machine(known, persistent, strict).run(stream)


class Bounded:
    """The rest of a file, of which no more is asked for than there is."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        """Return at most `count` bytes."""
        return self._file.read(max(0, min(count, self._size - self._file.tell())))

    def readline(self) -> bytes:
        """Return a line, or the beginning of one that is longer than any in a pickle."""
        return self._file.readline(_MAX_LINE)

    def tell(self) -> int:
        """Return the place in the file."""
        return self._file.tell()


# Opcodes whose argument, as pickletools decodes it, is the value.
_CONSTANTS = frozenset(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
        "BINUNICODE8",
    )
)  # fmt: skip
_SINGLE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class _Machine:
    def __init__(self, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None, strict: bool) -> None:
        self.known, self.persistent, self.strict = known, persistent, strict
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under the marks
        self.memo: dict[int, Any] = {}
        self.names: dict[str, Any] = {}

    def run(self, stream: IO[bytes]) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if count > MAX_OPCODES:
                    raise BadPickle(f"it has more than {MAX_OPCODES:,} opcodes")
                name = opcode.name
                if name in _CONSTANTS:
                    self.stack.append(argument)
                elif name in _SINGLE:
                    self.stack.append(_SINGLE[name])
                elif name == "STOP":
                    return self.stack.pop()
                else:
                    getattr(self, "_" + name.lower(), self._unknown)(argument)
        except (IndexError, KeyError) as error:
            raise BadPickle("it takes values that it has not made") from error
        except (ValueError, OverflowError, UnicodeError, NotImplementedError) as error:
            raise BadPickle(str(error).partition("\n")[0][:120]) from error
        raise BadPickle("it does not end")

    # ------------------------------------------------------------------------------------------- names and objects

    def _find(self, module: str, name: str) -> Any:
        path = f"{_OLD_MODULES.get(module, module)}.{name}"
        if not path.replace(".", "_").isidentifier():  # no name of Python, and messages show names as they are
            path = shown(path)
        if path not in self.names:
            if path in self.known:
                value = self.known[path]
                self.names[path] = Name(path, value) if callable(value) else value
            elif self.strict:
                raise RefusedName(path)
            else:
                self.names[path] = Name(path)
        return self.names[path]

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise BadPickle(f"it calls {self._shown(function)} with no tuple of arguments")
        if isinstance(function, Name):
            if function.function is not None:
                try:
                    return function.function(*arguments)
                except TypeError as error:  # another number of arguments
                    raise BadPickle(f"it calls {function.path} with arguments that do not fit") from error
            return Placeholder(function.path, arguments)
        if self.strict:
            raise RefusedName(self._shown(function))
        if isinstance(function, Placeholder):
            return Placeholder("the result of a call", (function, *arguments))
        raise BadPickle(f"it calls a value of type {type(function).__name__}")

    def _shown(self, value: Any) -> str:
        return value.path if isinstance(value, Name | Placeholder) else type(value).__name__.lstrip("_")

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self._find(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise BadPickle("it has a name that is no text")
        self.stack.append(self._find(module, name))

    def _reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        self.stack.append(self._call(self.stack.pop(), arguments))

    def _newobj(self, _: Any) -> None:
        self._reduce(None)

    def _newobj_ex(self, _: Any) -> None:
        named, arguments, made = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if self.strict:
            raise RefusedName(self._shown(made))
        if not isinstance(arguments, tuple):
            raise BadPickle(f"it makes {self._shown(made)} with no tuple of arguments")
        self.stack.append(Placeholder(self._shown(made), (*arguments, named)))

    def _inst(self, argument: str) -> None:
        arguments = tuple(self._pop_mark())
        self._global(argument)
        self._made_old(self.stack.pop(), arguments)

    def _obj(self, _: Any) -> None:
        made, *arguments = self._pop_mark()
        self._made_old(made, tuple(arguments))

    def _made_old(self, made: Any, arguments: tuple[Any, ...]) -> None:
        if self.strict:
            raise RefusedName(self._shown(made))
        self.stack.append(Placeholder(self._shown(made), arguments))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Placeholder):
            if made.state is not None:
                raise BadPickle(f"it fills an object of {made.path} twice")
            made.state = state
        elif hasattr(made, "set_state"):  # of the reader's own classes
            made.set_state(state)
        elif not isinstance(made, dict) and self.strict:
            raise RefusedName(self._shown(made))
        # The state of a dict is that of an OrderedDict of torch: versions of modules, which no weight depends on.

    def _ext1(self, code: int) -> None:
        """Take an extension code for a name without looking it up in the program's registry."""
        if self.strict:
            raise RefusedName(f"extension {code}")
        self.stack.append(Name(f"extension {code}"))

    _ext2 = _ext4 = _ext1

    def _persid(self, argument: str) -> None:
        self.stack.append(argument)
        self._binpersid(None)

    def _binpersid(self, _: Any) -> None:
        identifier = self.stack.pop()
        if self.persistent is None:
            raise BadPickle("it refers to data outside itself")
        self.stack.append(self.persistent(identifier))

    # --------------------------------------------------------------------------------------------------- containers

    def _pop_mark(self, _: Any = None) -> list[Any]:
        values = self.stack
        self.stack = self.below.pop()
        return values

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _empty_set(self, _: Any) -> None:
        self.stack.append(Placeholder("builtins.set"))

    def _list(self, _: Any) -> None:
        values = self._pop_mark()
        self.stack.append(values)

    def _tuple(self, _: Any) -> None:
        values = tuple(self._pop_mark())
        self.stack.append(values)

    def _tuple1(self, _: Any) -> None:
        self._last(1)

    def _tuple2(self, _: Any) -> None:
        self._last(2)

    def _tuple3(self, _: Any) -> None:
        self._last(3)

    def _last(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _dict(self, _: Any) -> None:
        values = self._pop_mark()
        self.stack.append({})
        self._set(values)

    def _frozenset(self, _: Any) -> None:
        values = self._pop_mark()
        self.stack.append(Placeholder("builtins.frozenset"))
        self.stack[-1].entries.extend(values)

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _additems(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.entries.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        elif self.strict:
            raise RefusedName(self._shown(target))
        else:
            raise BadPickle(f"it appends to a value of type {self._shown(target)}")

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self._pop_mark())

    def _set(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target = target.items
        if not isinstance(target, dict):
            if self.strict:
                raise RefusedName(self._shown(target))
            raise BadPickle(f"it sets items of a value of type {self._shown(target)}")
        for i in range(0, len(values), 2):
            target[_key(values[i])] = values[i + 1]

    # --------------------------------------------------------------------------------------------------------- memo

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binget = _long_binget = _get

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # -------------------------------------------------------------------------------------------------------- others

    def _proto(self, _: Any) -> None:
        pass

    _frame = _proto

    def _bytearray8(self, data: bytearray) -> None:
        self.stack.append(Placeholder("builtins.bytearray", (bytes(data),)))

    def _unknown(self, _: Any) -> None:
        raise BadPickle("it has an opcode that no checkpoint has")


def _key(value: Any) -> Any:
    """Return a key that is hashed in a moment; nested tuples may share parts so often that hashing them never ends."""
    if _is_scalar(value):
        return value
    if isinstance(value, list | dict):
        raise BadPickle(f"it has a key that is a {type(value).__name__}")
    if isinstance(value, tuple) and len(value) <= _MAX_KEY and all(map(_is_scalar, value)):
        return value
    return Placeholder("a key") if isinstance(value, tuple | int) else value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bytes | float | None) or (isinstance(value, int) and value.bit_length() <= 64)
