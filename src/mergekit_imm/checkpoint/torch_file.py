"""Files that torch.save wrote: where their tensors lie, found without torch and without running what a pickle asks for.

Such a file is a zip archive: `data.pkl`, a pickle that describes the tensors, and their bytes, each storage in an entry
of its own, not compressed.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..common.json_files import plain_size
from ..common.messages import shown
from ..errors import CheckpointError
from .safe_pickle import AGAIN, CURE, DTYPES, LIMIT, mapping, numbers, unpickled
from .safetensors_file import DTYPE_BITS, TensorFile, TensorInfo, open_to_read

_MODELS = ("state_dict", "model_state_dict", "model", "module")  # under which trainers put a model
_EDGE = 4096  # bytes at either end of an archive that are read at once: all that a small one has beside its tensor
_STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "ComplexFloatStorage": "C64",
}  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None  # None: bytes of any kind


@dataclass(frozen=True)
class _Tensor:
    """What a pickle says of a tensor."""

    storage: _Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    lazy: bool = False  # its values are those of its bytes, conjugated or with the other sign


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: str | None = None) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    kind = dtype or storage.dtype
    shape, strides, (offset,) = numbers(shape), numbers(strides), numbers((offset,))
    if kind not in DTYPE_BITS or len(shape) != len(strides):
        raise ValueError(f"a tensor has dtype {kind!r} and {len(strides)} strides")
    return _Tensor(storage, offset, shape, strides, kind, lazy=bool(rest[2:] and rest[2]))


def _rebuilt_3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any,
               *rest: Any) -> _Tensor:  # fmt: skip
    return _rebuilt(storage, offset, shape, strides, grad, hooks, *rest, dtype=dtype)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _with_attributes(rebuild: Any, kind: Any, arguments: Any, *_: Any) -> _Tensor:
    """A tensor with attributes of Python's, which are no part of a model."""
    if kind is not _Tensor or rebuild not in _REBUILD or not isinstance(arguments, tuple):
        raise ValueError("a tensor is not described as torch does")
    found: _Tensor = rebuild(*arguments)
    return found


def _persistent(pid: Any) -> _Storage:
    kind, dtype, key, _, _ = pid
    # Keys are texts; those of litgpt are numbers, which torch.load takes too.
    if kind != "storage" or type(key) not in (str, int) or not isinstance(dtype, str):
        raise ValueError("a storage is not described as torch does")
    return _Storage(str(key), dtype or None)


def _no_tensor(*arguments: Any) -> tuple[Any, ...]:
    """Stands for what torch.load takes beside tensors: bytes, sets, devices and the like."""
    return arguments  # a set may be one of tensors


_REBUILD = (_rebuilt, _rebuilt_3)
_BESIDE = (
    ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "Counter"),
    ("_codecs", "encode"),  # bytes
    *((module, name) for module in ("__builtin__", "builtins") for name in ("set", "bytearray", "complex")),
)  # fmt: skip
_TORCH: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): mapping,
    ("torch", "Size"): numbers,
    ("torch", "Tensor"): _Tensor,
    ("torch.nn.parameter", "Parameter"): _Tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuilt,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuilt_3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch.storage", "UntypedStorage"): "",
    **{("torch", name): dtype for name, dtype in {**DTYPES, **_STORAGES}.items()},
    **dict.fromkeys(_BESIDE, _no_tensor),
}


class _Window:
    """A range of a file, of which both ends are held."""

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        self.descriptor, self.begin, self.size = descriptor, begin, size
        self._head = os.pread(descriptor, min(_EDGE, size), begin)
        self._tail_at = max(0, size - _EDGE)
        self._tail = self._head if size <= _EDGE else os.pread(descriptor, _EDGE, begin + self._tail_at)

    def read(self, offset: int, count: int) -> bytes:
        """Return bytes of the window. Raises ValueError if they are not all within it."""
        if offset < 0 or offset + count > self.size:
            raise ValueError(f"bytes {offset} to {offset + count} are not in it")
        if offset + count <= len(self._head):
            return self._head[offset : offset + count]
        if offset >= self._tail_at:
            content = self._tail[offset - self._tail_at :][:count]
        else:
            content = os.pread(self.descriptor, count, self.begin + offset)
        if len(content) < count:
            raise ValueError(f"it ends before byte {offset + count}")
        return content


@dataclass(frozen=True)
class _Entry:
    header: int  # offset of its local header
    size: int
    check: int
    stored: bool  # neither compressed nor encrypted
    end: int = 0  # where the next one begins, or the directory


def _entries(window: _Window) -> dict[str, _Entry]:
    """Return the entries of a zip archive, by name. Raises ValueError or struct.error for what is none."""
    end = window.read(window.size - 22, 22) if window.size >= 22 else b""
    if end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise ValueError("it does not end as a zip archive does")
    size, begin = struct.unpack("<II", end[12:20])
    if 0xFFFFFFFF in (size, begin):
        locator = window.read(window.size - 42, 20)
        if locator[:4] == b"PK\6\7":
            last = window.read(int.from_bytes(locator[8:16], "little"), 56)
            if last[:4] != b"PK\6\6":
                raise ValueError("its directory is not found")
            size, begin = struct.unpack("<QQ", last[40:56])
    if size > LIMIT:
        raise ValueError(f"its directory has {size} bytes")
    directory = window.read(begin, size)
    found: dict[str, _Entry] = {}
    at = 0
    while at < len(directory):
        if directory[at : at + 4] != b"PK\1\2":
            raise ValueError("its directory is damaged")
        flags, method = struct.unpack("<HH", directory[at + 8 : at + 12])
        check, packed, full, named, extra, comment = struct.unpack("<IIIHHH", directory[at + 16 : at + 34])
        header = int.from_bytes(directory[at + 42 : at + 46], "little")
        name = directory[at + 46 : at + 46 + named].decode()
        if 0xFFFFFFFF in (packed, full, header):
            large = _large(directory[at + 46 + named : at + 46 + named + extra])
            full, packed, header = (large.pop(0) if each == 0xFFFFFFFF else each for each in (full, packed, header))
        if name in found:
            raise ValueError(f"it holds {name!r} twice")
        found[name] = _Entry(header, full, check, method == 0 and not flags & 1 and packed == full)
        at += 46 + named + extra + comment
    begins = sorted({begin, *(entry.header for entry in found.values())})
    ends = dict(pairwise(begins))
    return {name: replace(entry, end=ends.get(entry.header, begin)) for name, entry in found.items()}


def _large(extra: bytes) -> list[int]:
    """The sizes that do not fit where they belong."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        if kind == 1:
            return list(struct.unpack(f"<{length // 8}Q", extra[at + 4 : at + 4 + length // 8 * 8]))
        at += 4 + length
    raise ValueError("the size of an entry is missing")


def _begin(window: _Window, name: str, entry: _Entry) -> int:
    """Return where the bytes of an entry begin."""
    head = window.read(entry.header, 30)
    flags, named, extra = *struct.unpack("<H", head[6:8]), *struct.unpack("<HH", head[26:30])
    begin: int = entry.header + 30 + named + extra
    if begin + entry.size > entry.end:
        raise ValueError(f"its {name!r} is longer than its place")
    # The lengths in this header are nowhere else; were they damaged, other bytes would be taken for the tensor's.
    behind = window.read(begin + entry.size, 4) if flags & 8 else b"PK\7\10"
    if head[:4] != b"PK\3\4" or window.read(entry.header + 30, named) != name.encode() or behind != b"PK\7\10":
        raise ValueError(f"its {name!r} is not where its directory says")
    return begin


def _small(window: _Window, name: str, entry: _Entry) -> bytes:
    if entry.size > LIMIT:
        raise ValueError(f"its {name!r} has {entry.size} bytes, more than {LIMIT}")
    content = window.read(_begin(window, name, entry), entry.size)
    if entry.check and zlib.crc32(content) != entry.check:  # torch can be told to write none
        raise ValueError(f"its {name!r} is damaged: its check sum is another")
    return content


class _Archive:
    """A zip archive of torch at a range of an open file."""

    def __init__(self, descriptor: int, begin: int, size: int, where: str) -> None:
        self.window = _Window(descriptor, begin, size)
        if self.window.size >= 2 and self.window.read(0, 2) == b"\x80\x02":
            raise CheckpointError(
                f"{where} is of the form that torch wrote before version 1.6; load it with torch and `torch.save` it"
                " again"
            )
        self.entries = _entries(self.window)
        packed = next((name for name, entry in self.entries.items() if not entry.stored), None)
        if packed is not None:
            raise CheckpointError(
                f"{where} is compressed, its {shown(packed)!r} for one; load it with torch and `torch.save` it again"
            )
        prefixes = [name.removesuffix("data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(prefixes) != 1:
            raise ValueError("it is a zip archive, but not one of torch: it has no data.pkl")
        self.prefix = prefixes[0]
        order = self._content("byteorder") if f"{self.prefix}byteorder" in self.entries else b"little"
        if order != b"little":
            raise CheckpointError(
                f"{where} was written in {shown(order.decode(errors='replace'))}-endian byte order;"
                " load it with torch on a little-endian machine and save it again"
            )
        self.pickled = unpickled(self._content("data.pkl"), _TORCH, where, _persistent)
        self._begins: dict[str, int] = {}

    def _content(self, name: str) -> bytes:
        name = self.prefix + name
        return _small(self.window, name, self.entries[name])

    def info(self, name: str, tensor: _Tensor, file: str) -> TensorInfo:
        """Return where the bytes of a tensor are in the file. Raises ValueError for those that are not there."""
        key = f"{self.prefix}data/{tensor.storage.key}"
        entry = self.entries.get(key)
        if entry is None:
            raise ValueError(f"its {key!r} is missing")
        if key not in self._begins:
            self._begins[key] = _begin(self.window, key, entry)
        width = DTYPE_BITS[tensor.dtype] // 8
        nbytes = math.prod(tensor.shape) * width
        first = tensor.offset * width
        if first + nbytes > entry.size:
            raise ValueError(f"it ends at byte {first + nbytes} of {key!r}, which has {entry.size}")
        begin = self.window.begin + self._begins[key] + first
        return TensorInfo(name, tensor.dtype, tensor.shape, file, begin, nbytes)


def open_pickled(path: Path, name: str) -> TensorFile:
    """Read which tensors a file of torch.save holds: those of a state dict, by name. None of their bytes is read.

    Raises CheckpointError for any other content, and for a file that is missing, truncated or malformed.
    """
    where = shown(path)
    try:
        size = plain_size(path)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)
        with _told(where):
            archive = _Archive(descriptor, 0, size, where)
            state, left = _state(archive.pickled, where)
            tensors = [_named(archive, key, value, name, where) for key, value in state.items()]
    finally:
        os.close(descriptor)
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    more = ", …" if len(left) > 4 else ""
    note = f"note: left out of {where}, as they are no tensors: {', '.join(map(shown, left[:4]))}{more}"
    return TensorFile(name, path, status.st_size, {}, tuple(tensors), status.st_mtime_ns, notes=(note,) if left else ())


def tensor_at(descriptor: int, begin: int, size: int, name: str, file: str, where: str) -> TensorInfo:
    """Return the one tensor of an archive that is a range of an open file. Raises CheckpointError."""
    with _told(where):
        archive = _Archive(descriptor, begin, size, where)
        if not isinstance(archive.pickled, _Tensor):
            raise ValueError(f"it holds a {type(archive.pickled).__name__}, no tensor")
        return _named(archive, name, archive.pickled, file, where)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Turn what is found wrong with an archive into one line."""
    try:
        yield
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(f"{where} is no whole file of torch.save: {shown(error, 200)}; {AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error


def _state(pickled: Any, where: str) -> tuple[dict[str, _Tensor], list[str]]:
    """Return the tensors of a state dict by name, and what else is in the file, which is no tensor."""
    clean: set[int] = set()
    if not isinstance(pickled, dict) or (pickled and not _holds_data(pickled, clean)):
        raise CheckpointError(f"{where} holds no mapping of names to tensors; {CURE}")
    left: list[str] = []
    models = [key for key in _MODELS if isinstance(pickled.get(key), dict) and _holds_data(pickled[key], clean)]
    if len(models) == 1:
        beside = {key: value for key, value in pickled.items() if key != models[0]}
        other = next((key for key, value in beside.items() if _holds_data(value, clean)), None)
        if other is not None:
            raise CheckpointError(
                f"{where} holds more than a model: tensors under {shown(other)!r}, beside {models[0]!r}; load it with"
                f" torch, and `torch.save` what is under {models[0]!r} alone"
            )
        pickled, left = pickled[models[0]], [str(key) for key in beside]
    found: dict[str, _Tensor] = {}
    for key, value in pickled.items():
        if isinstance(value, _Tensor) and isinstance(key, str):
            found[key] = value
        elif not _holds_data(value, clean):
            left.append(str(key))
        elif not isinstance(key, str):
            raise CheckpointError(f"{where} holds something under {shown(key)}, which is no name; {CURE}")
        else:
            kind = "a mapping" if isinstance(value, dict) else "a storage or a list of tensors"
            raise CheckpointError(
                f"{where} holds {kind} under {shown(key)!r}; load it with torch and `torch.save` the mapping of names"
                " to tensors alone"
            )
    return found, left


def _holds_data(value: Any, clean: set[int]) -> bool:
    """Whether there is a tensor or a storage in it, however deep; `clean` are the containers known to hold none."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, _Tensor | _Storage):
            return True
        if isinstance(one, dict | list | tuple) and id(one) not in seen and id(one) not in clean:
            seen.add(id(one))
            stack += one.values() if isinstance(one, dict) else one
    clean |= seen
    return False


def _named(archive: _Archive, key: str, tensor: _Tensor, file: str, where: str) -> TensorInfo:
    if tensor.lazy:
        raise CheckpointError(
            f"{where}: tensor '{shown(key)}' is stored as the conjugate or negative of its bytes; save it again after"
            " `.resolve_conj().resolve_neg()`"
        )
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size > 1 and stride != step and math.prod(tensor.shape) > 1:
            raise CheckpointError(
                f"{where}: tensor '{shown(key)}', {list(tensor.shape)}, is stored with strides {list(tensor.strides)},"
                " not row by row; save it again after `.contiguous()`"
            )
        step *= size
    try:
        return archive.info(key, tensor, file)
    except ValueError as error:
        raise ValueError(f"tensor {key!r}: {error}") from error
