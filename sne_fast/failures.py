"""Errors that a user may cause, as one sentence each."""

from __future__ import annotations

import re
import sys

from .free_memory import MemoryNeeded

EXPECTED = (ValueError, TypeError, OSError, KeyError, ModuleNotFoundError, MemoryError)
"""Kinds of errors that have a message for the user; all others are bugs and show a traceback."""

_ALONE = re.compile(r"^(pack: )?(network 0( \('.*?'\))?[:,]? ?)?")

# torch raises a RuntimeError on the CPU and a subclass of it, OutOfMemoryError, on a GPU.
_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|alloc_cpu\.cpp|out of memory|can't allocate memory", re.IGNORECASE)
_TRIED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)")


def own_errors() -> tuple[type[BaseException], ...]:
    """Return the errors of this package that are RuntimeErrors, from the modules that a command has loaded."""
    own = (("sne_fast.ops.dispatch", "BackendError"), ("sne_fast.benchmark.checks", "CheckFailed"))
    return tuple(getattr(sys.modules[module], name) for module, name in own if module in sys.modules)


def is_expected(error: BaseException) -> bool:
    """Return whether an error has a message for the user; a closed pipe has none, as nobody reads on."""
    if isinstance(error, BrokenPipeError):
        return False
    return isinstance(error, (*EXPECTED, *own_errors())) or is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, in Python, in torch on the CPU or on a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def sentence(error: BaseException, work: str = "") -> str:
    """Return the message of an error as one sentence.

    Args:
        error: one that `is_expected`.
        work: what memory was for, such as "1,000 weights", where that ran out.
    """
    text: object = error
    if is_out_of_memory(error) and not isinstance(error, MemoryNeeded):
        return _memory_sentence(str(error), work)
    if isinstance(error, KeyError) and error.args:
        text = error.args[0]  # str() would put it in quotes
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(text).split())


def any_sentence(error: Exception) -> str:
    """Return the message of any error as one sentence, for jobs that record failures and go on."""
    if is_expected(error):
        return utf8(of_one(sentence(error)))
    said = " ".join(str(error).split())[:200]
    return utf8(f"{type(error).__name__}{f': {said}' if said else ''}, which is a bug of sne_fast; please report it")


def utf8(text: str) -> str:
    """Return text with escapes for what UTF-8 cannot hold: bytes of paths that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def of_one(reason: str) -> str:
    """Return a sentence about a network that was given alone, without its being "network 0" of a call."""
    return _ALONE.sub("", reason)


def _memory_sentence(message: str, work: str) -> str:
    where = "the GPU's memory" if "CUDA" in message else "memory"
    lacking = ""
    if tried := _TRIED.search(message):
        size, unit = tried.groups()
        lacking = f"; {f'{int(float(size)):,}' if unit == 'bytes' else size} {unit} more were needed"
    return f"out of {where}{f' with {work}' if work else ''}{lacking}"
