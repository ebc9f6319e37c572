"""Read untrusted pickles: only objects of known classes are made, and no other code is run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ..common.messages import shown
from ..errors import CheckpointError

LIMIT = 256 << 20  # bytes of a pickle; a model of a million tensors needs less
_MAX_NUMBER = 1 << 62  # for sizes and offsets
_MAX_DIMENSIONS = 64  # torch's own limit
CURE = "load the model with transformers and `save_pretrained` (it writes safetensors)"
AGAIN = "copy or download it again"
TRUSTED = (
    "if you trust it, load it by `torch.load(..., weights_only=False)` and `torch.save` its tensors alone, by name"
)
PLAIN = "save its tensors as plain ones, after `.to_dense()` if they are sparse and `.dequantize()` if quantised"


class Stub:
    """Stand for an object of another library's class; holds its state."""

    __slots__ = ("state",)
    state: Any

    def __new__(cls, *_: Any) -> Stub:
        """Accept any arguments; the state is set here, as a pickle may leave it out."""
        made = super().__new__(cls)
        made.state = None
        return made

    def get(self, name: str) -> Any:
        """Return an attribute, or None if there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _SafeDict(dict[Any, Any]):
    """A dict with keys that hash fast: hashing nested tuples can take forever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | Stub):
            raise ValueError(f"a {type(key).__name__} is the key of a mapping")
        super().__setitem__(key, value)


def mapping() -> dict[Any, Any]:
    """Return an empty dict in the place of an OrderedDict."""
    return _SafeDict()


# The opcodes in torch's own files; all others are refused.
_OPCODES = (
    "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM "
    "SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
).split()


# The unpickler in C allocates as much as a damaged pickle asks for.
class _Unpickler(pickle._Unpickler):
    """Make objects of known classes only, and call known functions only."""

    stack: list[Any]
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES)
    }

    def __init__(self, content: bytes, known: Mapping[tuple[str, str], Any], persistent: Callable[[Any], Any]) -> None:
        super().__init__(io.BytesIO(content))
        self.known, self.persistent = known, persistent

    def find_class(self, module: str, name: str) -> Any:
        found = self.known.get((module, name))
        if found is None:
            raise _UnknownGlobalError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid)

    def _dict(self) -> None:
        self.append(_SafeDict())

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Stub):
            made.state = state
        elif not isinstance(made, _SafeDict):  # its state holds module versions: ignore it
            raise ValueError(f"a {type(made).__name__} is given a state")

    dispatch[pickle.EMPTY_DICT[0]] = _dict
    dispatch[pickle.BUILD[0]] = _build


class _UnknownGlobalError(Exception):
    """A pickle asks for a class or function that is not known."""


def load_pickle(content: bytes, known: Mapping[tuple[str, str], Any], where: str, persistent: Any = None) -> Any:
    """Return the object in a pickle of `known` classes and functions, by (module, name).

    `persistent` loads what lies outside the pickle. Raises CheckpointError if the pickle asks for anything else, naming
    it, or is damaged.
    """
    try:
        return _Unpickler(content, known, persistent).load()
    except _UnknownGlobalError as error:
        name = str(error)
        reason, cure = "and only tensors are read from such files, as it may run any code", TRUSTED
        if name.startswith("torch._utils._rebuild_"):
            reason, cure = "which is not read", PLAIN
        elif name.startswith("torch.") and name.count(".") == 1:
            reason, cure = "which is not read", CURE
        raise CheckpointError(f"{where} holds a {shown(name)}, {reason}; {cure}") from error
    except Exception as error:
        raise CheckpointError(
            f"{where} holds a pickle that is damaged, or not of torch's kind ({type(error).__name__}:"
            f" {shown(error, 100)}); {AGAIN}, or, if torch.load reads it, `torch.save` its tensors alone, by name"
        ) from error


def numbers(value: Any = ()) -> tuple[int, ...]:
    """Return a tuple of sizes or offsets, checked. Raises ValueError for anything else."""
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise ValueError("a shape is not a tuple of numbers")
    if not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in value):
        raise ValueError("a shape holds something that is not a size")
    return value
