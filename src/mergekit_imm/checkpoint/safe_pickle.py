"""Pickles of others, read without running what they ask for: objects of known classes are made, and no others."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ..common.messages import shown
from ..errors import CheckpointError

LIMIT = 256 << 20  # bytes of a pickle; that of a model with a million tensors has less
_LARGEST = 1 << 62  # of any number that says where something is, or how large
_DIMENSIONS = 64  # torch's own limit
CURE = "load the model with transformers and `save_pretrained` (it writes safetensors)"
AGAIN = "copy or download it again"
TRUSTED = (
    "if you trust it, load it by `torch.load(..., weights_only=False)` and `torch.save` its tensors alone, by name"
)
PLAIN = "save its tensors as plain ones, after `.to_dense()` if they are sparse and `.dequantize()` if quantised"

DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL", "uint8": "U8",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


class Stub:
    """Stands for an object of a class of others, and holds its state."""

    __slots__ = ("state",)
    state: Any

    def __new__(cls, *_: Any) -> Stub:
        """Make one, whatever from: a pickle may leave out the rest."""
        made = super().__new__(cls)
        made.state = None
        return made

    def get(self, name: str) -> Any:
        """Return an attribute; None if it has none of that name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Names(dict[Any, Any]):
    """A dict whose keys take no time to hash: tuples of tuples may take forever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | Stub):
            raise ValueError(f"a {type(key).__name__} is the key of a mapping")
        super().__setitem__(key, value)


def mapping() -> dict[Any, Any]:
    """Return what stands for an OrderedDict."""
    return _Names()


# The instructions that torch's own files have. Others are not followed.
_FOLLOWED = (
    "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM "
    "SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
).split()


# The one in C makes room for as many objects as a pickle says it has, be it damaged or not.
class _Unpickler(pickle._Unpickler):
    """Makes objects of the given classes only, and calls nothing but the functions given."""

    stack: list[Any]
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _FOLLOWED)
    }

    def __init__(self, content: bytes, known: Mapping[tuple[str, str], Any], persistent: Callable[[Any], Any]) -> None:
        super().__init__(io.BytesIO(content))
        self.known, self.persistent = known, persistent

    def find_class(self, module: str, name: str) -> Any:
        found = self.known.get((module, name))
        if found is None:
            raise _UnknownError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid)

    def _dict(self) -> None:
        self.append(_Names())

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Stub):
            made.state = state
        elif not isinstance(made, _Names):  # whose state is the versions of its modules
            raise ValueError(f"a {type(made).__name__} is given a state")

    dispatch[pickle.EMPTY_DICT[0]] = _dict
    dispatch[pickle.BUILD[0]] = _build


class _UnknownError(Exception):
    """A class, or a function, that is not known."""


def unpickled(content: bytes, known: Mapping[tuple[str, str], Any], where: str, persistent: Any = None) -> Any:
    """Return the object of a pickle that holds objects of the `known` (module, name) only; no other code is run.

    Raises CheckpointError for any other, by its name, and for a damaged one.
    """
    try:
        return _Unpickler(content, known, persistent).load()
    except _UnknownError as error:
        told = str(error)
        why, cure = "and only tensors are read from such files, as it may run any code", TRUSTED
        if told.startswith("torch._utils._rebuild_"):
            why, cure = "which is not read", PLAIN
        elif told.startswith("torch.") and told.count(".") == 1:
            why, cure = "which is not read", CURE
        raise CheckpointError(f"{where} holds a {shown(told)}, {why}; {cure}") from error
    except Exception as error:
        raise CheckpointError(
            f"{where} holds a pickle that is damaged, or not of torch's kind ({type(error).__name__}:"
            f" {shown(error, 100)}); {AGAIN}, or, if torch.load reads it, `torch.save` its tensors alone, by name"
        ) from error


def numbers(value: Any = ()) -> tuple[int, ...]:
    """Return a sequence of sizes or offsets as a tuple. Raises ValueError for anything else."""
    if not isinstance(value, tuple) or len(value) > _DIMENSIONS:
        raise ValueError("a shape is no tuple of numbers")
    if not all(type(number) is int and 0 <= number < _LARGEST for number in value):
        raise ValueError("a shape holds what is no size")
    return value
