"""Loops that numba compiles once and later runs load without it: their machine code is kept in files.

Importing numba and loading one function from its own cache takes a second; loading an object file with llvmlite takes
a few milliseconds. A file holds one loop for one kind of arguments. Its name is a digest of what the code depends on:
the source, the CPU and its features, the versions and settings of numba. Its content begins with a digest of the rest.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .object_code import Function, function_of, machine_code, target

COMPILING = (
    "note: compiling for this CPU, once for each kind of merge: a few seconds, up to a minute on a busy machine; later"
    " merges of this kind start at once"
)
_FORMAT = "1"
_DIGEST = 32  # bytes
_MASK = (1 << 64) - 1
_lock = threading.Lock()
_said: set[str] = set()
_hushed = False


class Loop:
    """A function of a module that numba compiles, called as usual, without the GIL: `Loop("package.module", "name")`.

    It takes arrays, numbers, None and tuples of these, writes into the arrays, and returns nothing.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._entries: dict[str, Function] = {}

    def __call__(self, *arguments: Any) -> None:
        """Call the function; compile it for arguments of this kind if no file holds it."""
        kinds: list[str] = []
        slots: list[int] = []
        for each in arguments:
            _flatten(each, kinds, slots)
        kind = " ".join(kinds)
        entry = self._entries.get(kind)
        if entry is None:
            with _lock:
                entry = self._entries[kind] = self._entries.get(kind) or self._load(kind, arguments)
        if entry((ctypes.c_uint64 * len(slots))(*slots)):
            raise RuntimeError(f"{self._name} failed for {kind}")  # a bug: the loops raise nothing

    def _load(self, kind: str, arguments: tuple[Any, ...]) -> Function:
        name = f"{self._name}-{self._key(kind)}.o"
        for folder in folders():
            with suppress(OSError, RuntimeError):  # absent, or not of this machine after all
                content = (folder / name).read_bytes()
                code = content[_DIGEST:]
                if content == with_digest(code):
                    return function_of(code)
        say(COMPILING)
        code = machine_code(getattr(import_module(self._module), self._name), arguments)
        if not any(_is_written(folder, name, with_digest(code)) for folder in folders()):
            say(
                "note: no folder to keep what was compiled in, so each run compiles again; set NUMBA_CACHE_DIR to a"
                " writable one"
            )
        return function_of(code)

    def _key(self, kind: str) -> str:
        import llvmlite.binding as llvm

        versions = _version("numba"), _version("llvmlite"), str(llvm.llvm_version_info)
        settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
        settings = [each for each in settings if not each.startswith("NUMBA_CACHE_DIR=")]
        parts = (_FORMAT, self._module, self._name, kind, *target(), *versions, *settings, _source(self._module))
        return blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def with_digest(code: bytes) -> bytes:
    """Return the content of a file that keeps some code."""
    return blake2b(code, digest_size=_DIGEST).digest() + code


@contextmanager
def hushed() -> Iterator[None]:
    """Say nothing in this block, in no thread."""
    global _hushed
    before, _hushed = _hushed, True
    try:
        yield
    finally:
        _hushed = before


def say(line: str) -> None:
    """Say a line on stderr, once in a process."""
    if line not in _said and not _hushed:
        _said.add(line)
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _version(package: str) -> str:
    """Return the version of a package, without importing it: as a file of its own states it, or else its metadata."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    stated = Path(spec.origin).with_name("_version.py")
    if stated.is_file():
        return stated.read_text(encoding="utf-8")
    from importlib.metadata import version  # takes as long as all else

    return version(package)


@cache
def _source(module: str) -> str:
    """Return the source of a module and of this package: a compiled loop uses nothing else of ours."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    paths = [Path(spec.origin), *sorted(Path(__file__).parent.glob("*.py"))]
    return "\0".join(path.read_text(encoding="utf-8") for path in dict.fromkeys(paths))


def folders() -> Iterator[Path]:
    """Yield where compiled loops may be kept, the best place first."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(os.environ["NUMBA_CACHE_DIR"])
        return
    yield Path(__file__).with_name("__pycache__")
    with suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit_imm"


def _is_written(folder: Path, name: str, content: bytes) -> bool:
    """Write a file atomically; return whether the folder took it."""
    new = folder / f"{name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        new.replace(folder / name)
    except OSError:
        with suppress(OSError):
            new.unlink()
        return False
    return True


def _flatten(value: Any, kinds: list[str], slots: list[int]) -> None:
    """Append the kind of an argument, and what numba passes for it: integers of at most 64 bits."""
    if isinstance(value, np.ndarray):
        flags = value.flags
        order = "C" if flags.c_contiguous else "F" if flags.f_contiguous else "A"
        layout = f"{order}{'w' if flags.writeable else 'r'}{'a' if flags.aligned else 'u'}"
        kinds.append(f"{value.dtype.str}{value.ndim}{layout}")
        slots += (0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides)
    elif value is None:
        kinds.append("none")
        slots.append(0)
    elif isinstance(value, tuple):
        kinds.append("(")
        for each in value:
            _flatten(each, kinds, slots)
        kinds.append(")")
    elif isinstance(value, np.generic):
        kinds.append(value.dtype.str)
        slots.append(int.from_bytes(value.tobytes(), "little"))
    elif isinstance(value, float):
        kinds.append("float")
        slots.append(*struct.unpack("<Q", struct.pack("<d", value)))
    else:
        kinds.append(type(value).__name__)  # int or bool
        slots.append(int(value) & _MASK)
