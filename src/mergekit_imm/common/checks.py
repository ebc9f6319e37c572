"""Check arguments that should be paths, strings, numbers or tensors; each error says in one line what was given."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .messages import shown

MODEL_PLACE = "a folder, a .safetensors file or a hub id org/name[@revision]"


def as_path(name: str, value: Any, wanted: str = MODEL_PLACE) -> str | Path:
    """Return a str or Path of anything path-like. Raises ArgumentError, which says what was given instead."""
    if isinstance(value, str | Path):
        return value
    if isinstance(value, os.PathLike):
        place = os.fspath(value)
        if isinstance(place, str):
            return Path(place)
    raise ArgumentError(f"{name} is {described(value)}; give {wanted}")


def why_no_folder(path: Path) -> str:
    """Say why a path is not one of a folder."""
    return "is not a folder" if path.exists() else "does not exist"


def described(value: Any) -> str:
    """Describe a value for a message, with the function that takes such a value if there is one.

    >>> described([1, 2]), described(None)
    ('a list of 2', 'None')
    """
    kind = type(value).__name__
    if value is None:
        return "None"
    if is_module(value):
        return f"a model in memory ({kind}), which merge_into merges as the sft and save_pretrained saves to a folder"
    if is_tensor(value):
        return "a tensor, which dare_merge merges"
    if isinstance(value, Mapping):
        return f"a {kind} of {len(value)} names; dare_merge merges tensors by name"
    if isinstance(value, bytes | bytearray):
        return f"{kind}, which os.fsdecode turns into a string"
    if isinstance(value, list | tuple | set | frozenset):
        return f"a {kind} of {len(value)}"
    return f"{shown(repr(value), 60)}, a {kind}"


def is_module(value: Any) -> bool:
    """Return whether a value is a torch module, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def is_tensor(value: Any) -> bool:
    """Return whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def check_state(label: str, state: Any) -> None:
    """Raise ArgumentError unless `state` maps names to tensors."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"{label} is {described(state)}; give a mapping of tensors by name, such as a state dict")
    for name, value in state.items():
        if not isinstance(name, str):
            raise ArgumentError(f"{label} has the key {shown(repr(name), 60)}; tensor names are strings")
        if not is_tensor(value):
            how = "; convert it with torch.from_numpy" if type(value).__module__ == "numpy" else ""
            how = "; read all of it, with [:]" if type(value).__name__ == "PySafeSlice" else how
            raise ArgumentError(f"tensor '{shown(name)}' of {label} is a {type(value).__name__}, not a tensor{how}")


def check_tensor_name(name: Any) -> None:
    """Raise ArgumentError unless `name` is a string."""
    if not isinstance(name, str):
        raise ArgumentError(f"name is {shown(repr(name), 60)}; give the tensor's name in the base's file, a string")


def as_text(name: str, value: Any) -> str:
    """Return `value` if it is a string. Raises ArgumentError."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name} is {described(value)}; give a text")
    return value


def as_texts(name: str, texts: Sequence[str], *, empty: bool = False) -> list[str]:
    """Return texts as a list. Raises ArgumentError for a bare string, other types and, unless `empty`, empty texts."""
    if isinstance(texts, (str, bytes)):
        raise ArgumentError(f"{name}: one text '{shown(texts, 60)}'; give a list of texts")
    try:
        found = list(texts)
    except TypeError as error:
        raise ArgumentError(f"{name}: {shown(repr(texts), 60)}; give a list of texts") from error
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise ArgumentError(f"{name}: number {i} of {len(found)} is {shown(repr(text), 60)}, not a text")
        if not text.strip() and not empty:
            raise ArgumentError(f"{name}: number {i} of {len(found)} is empty; leave it out")
    return found


def as_items(name: str, values: Any, what: str = "items") -> list[Any]:
    """Return a collection as a list. Raises ArgumentError for a text, a mapping, and what is no collection."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ArgumentError(f"{name} is {described(values)}; give a list of {what}")
    return list(values)


def check_callable(name: str, value: Any, call: str) -> None:
    """Raise ArgumentError unless `value` can be called; `call` says how."""
    if not callable(value):
        raise ArgumentError(f"{name} is {described(value)}; give a function {call}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ArgumentError unless `value` is an integer of at least `least`."""
    if not is_integer(value) or value < least:
        raise ArgumentError(f"{name} is {shown(repr(value), 60)}; it must be a whole number, {least} or more")


def is_integer(value: object) -> bool:
    """Return whether a value is an integer, of numpy too; bools are not."""
    return isinstance(value, int | Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a real number, of numpy too; bools are not."""
    return isinstance(value, int | float | Real) and not isinstance(value, bool)


def as_number(value: Any) -> Any:
    """Return a number as a Python int or float, which JSON can hold; anything else unchanged.

    >>> import numpy as np
    >>> as_number(np.float32(0.5)), as_number(np.int64(3)), as_number("x")
    (0.5, 3, 'x')
    """
    if isinstance(value, int | float) or not is_number(value):
        return value
    return int(value) if is_integer(value) else float(value)
