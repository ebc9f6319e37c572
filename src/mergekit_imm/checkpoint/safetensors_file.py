"""One safetensors file: header, ranges of bytes, fingerprint."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from ..common.json_files import parse_json, plain_size, without_duplicates
from ..common.messages import shown
from ..common.notes import Note
from ..errors import ChangedError, CheckpointError
from ..numerics.dtypes import DTYPE_BITS
from .lfs_pointer import check_no_pointer

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's
HEADER_LIMIT = 100_000_000  # safetensors' own
_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_Entry = tuple[Any, tuple[Any, ...], Any, Any]  # dtype, shape, first byte, end
_INTEGERS = {int}  # what the numbers of a header are
_PAGE, _STRIDE, _EDGE = 4096, 16 << 20, 64 << 10


@dataclass(slots=True, unsafe_hash=True)  # never changed, but frozen ones take four times as long to make
class TensorInfo:
    """Where one tensor lies on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str  # name of the file within its checkpoint
    begin: int  # offset of its first byte in the file
    nbytes: int

    is_delta: ClassVar[bool] = False  # a computed tensor may be one, to be added to the start

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.nbytes * 8 // DTYPE_BITS[self.dtype]

    @property
    def stored(self) -> int:
        """Bytes on disk."""
        return self.nbytes

    @property
    def output_dtype(self) -> str:
        """The dtype of an output with this base."""
        return self.dtype


@dataclass(frozen=True)
class TensorFile:
    """A file as its header describes it, tensors in file order."""

    name: str
    path: Path | None  # None if it is on a hub, not downloaded
    size: int
    metadata: dict[str, str]
    tensors: tuple[TensorInfo, ...]
    written: int = 0  # mtime in ns
    notes: tuple[Note, ...] = ()  # what was found in it besides tensors


_in_use: WeakValueDictionary[tuple[Any, ...], TensorFile] = WeakValueDictionary()  # by name, size and header


def open_tensorfile(path: Path, name: str) -> TensorFile:
    """Read the header of a safetensors file, validated by the safetensors library. Reads no tensor.

    A file of the same name, size and header as one in use shares its tensors: base and sft are mostly stored alike.
    Raises CheckpointError if the file is missing, truncated or malformed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        plain_size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, HEADER_LIMIT))
            status = os.fstat(file.fileno())
        key = (name, status.st_size, length, blake2b(header).digest())
        found = _in_use.get(key)
        if found is None:
            with safe_open(path, framework="numpy"):
                pass
    except SafetensorError as error:
        check_no_pointer(path)
        raise CheckpointError(
            f"{shown(path)} is not a whole safetensors file: {shown(error, 300)}; copy or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    if found is not None:
        return replace(found, path=path, written=status.st_mtime_ns)
    parsed = replace(parse_header(header, name, status.st_size, path), written=status.st_mtime_ns)
    _in_use[key] = parsed
    return parsed


def parse_header(header: bytes, name: str, size: int, path: Path | None) -> TensorFile:
    """Build a TensorFile from the JSON header of a file of `size` bytes.

    Raises CheckpointError for anything the safetensors format forbids, including duplicate names.
    """
    where = shown(path or name)
    try:
        content = parse_json(header, _object)
        metadata = content.pop("__metadata__", None) or {}
        tensors = _tensors(content, name, len(header) + 8)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} has a malformed header: {shown(error, 300)}") from error
    del content
    tensors.sort(key=attrgetter("begin", "nbytes"))
    end = len(header) + 8
    for tensor in tensors:
        if tensor.begin != end:
            raise CheckpointError(
                f"{where}: tensor '{shown(tensor.name)}' begins at byte {tensor.begin}, but the one before it ends at"
                f" {end}; the file is malformed"
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{where} has {size} bytes, but its header describes {end}; it was cut off or is still being written:"
            " copy or download it again"
        )
    return TensorFile(name, path, size, metadata, tuple(tensors))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    """Return an object of a header; of the entry of a tensor what is needed, which takes less memory."""
    content = without_duplicates(pairs)
    if type(content.get("data_offsets")) is not list:
        return content
    begin, end = content["data_offsets"]
    return content["dtype"], tuple(content["shape"]), begin, end


def _tensors(entries: dict[str, Any], file: str, data: int) -> list[TensorInfo]:
    tensors = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one of each, however many tensors have it
    for name, entry in entries.items():
        if type(entry) is not tuple:
            raise ValueError(f"tensor {name!r} has no data_offsets")
        dtype, shape, begin, end = entry
        if dtype not in DTYPE_BITS:
            raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
        numbers = (*shape, begin, end)
        if {*map(type, numbers)} != _INTEGERS or min(numbers) < 0:
            raise ValueError(f"tensor {name!r} has shape {shape} at bytes {begin}..{end}")
        if DTYPE_BITS[dtype] * math.prod(shape) != (end - begin) * 8:
            raise ValueError(f"tensor {name!r}, {dtype} {list(shape)}, does not fill its bytes {begin}..{end}")
        shape = shapes.setdefault(shape, shape)
        # Models share names and dtypes.
        tensors.append(TensorInfo(sys.intern(name), sys.intern(dtype), shape, file, data + begin, end - begin))
    return tensors


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]
) -> tuple[bytes, list[int], int]:
    """Lay out a file from (name, dtype, shape, nbytes), in this order.

    Returns the file's first bytes (length and header), the offset of each tensor, and the file's size.
    """
    written = [f'{{"__metadata__":{_json(metadata)}']
    begins, end = [], 0
    shapes: dict[tuple[int, ...], str] = {}
    for name, dtype, shape, nbytes in tensors:
        if shape not in shapes:
            shapes[shape] = _json(shape)
        written.append(
            f'{_json(name)}:{{"dtype":"{dtype}","shape":{shapes[shape]},"data_offsets":[{end},{end + nbytes}]}}'
        )
        begins.append(end)
        end += nbytes
    header = f"{','.join(written)}}}".encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    if len(header) > HEADER_LIMIT:
        raise CheckpointError(
            f"an output file would need a header of {len(header)} bytes, but safetensors allows {HEADER_LIMIT};"
            " use a smaller --max-shard-size"
        )
    return head, [len(head) + begin for begin in begins], len(head) + end


def is_plain_name(name: object) -> bool:
    """Whether a name is a file name alone, so that it cannot point outside its folder.

    The check is lexical: links, as in a hub cache, are followed.

    >>> is_plain_name("model.bin"), is_plain_name("../model.bin")
    (True, False)
    """
    if not isinstance(name, str) or name in (".", "..") or any(letter in name for letter in "\\\0"):
        return False
    return PurePosixPath(name).name == name


def open_to_read(path: Path) -> int:
    """Open an input file and return its descriptor. Raises CheckpointError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        cure = "allow more open files (ulimit -n)" if error.errno == errno.EMFILE else "make it readable"
        raise CheckpointError(
            f"{shown(path)} cannot be read: {error.strerror}; {cure} and run the same command again"
        ) from error


def read_into(descriptor: int, buffer: memoryview, offset: int, where: object) -> None:
    """Fill a buffer from a file at `offset`. Raises CheckpointError if the file ends or the read fails."""
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"{where}: reading at byte {offset + done} failed: {error.strerror}; check the disk and run the same"
                " command again"
            ) from error
        if got == 0:
            raise ChangedError(
                f"{where} ended at byte {offset + done}: it was changed or cut off during the merge; wait until the"
                " model is complete and merge again"
            )
        done += got


Stamp = tuple[int, int]  # size, mtime in ns


def stamp(path: Path) -> Stamp:
    """Return the size and mtime of a file, to notice later writes. Raises OSError."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, before: Stamp) -> None:
    """Raise ChangedError if a file's stamp is no longer `before`."""
    try:
        same = stamp(path) == before
    except OSError:
        same = False
    if not same:
        raise ChangedError(
            f"{shown(path)} was written or removed during the merge; wait until the model is complete and merge again"
        )


def fingerprint(file: TensorFile) -> str:
    """Return fingerprint v1: a blake2b of the header bytes, the size, and a page every 16 MiB and at the end.

    For other formats the first and last 64 KiB stand in for the header. Path and mtime do not count, and a change
    that spares all these pages goes unnoticed.
    """
    assert file.path is not None
    digest = blake2b(digest_size=16)
    try:
        with file.path.open("rb") as handle:
            if file.name.endswith(".safetensors"):
                length = handle.read(8)
                digest.update(length + handle.read(int.from_bytes(length, "little")))
            else:
                digest.update(handle.read(_EDGE) + os.pread(handle.fileno(), _EDGE, max(0, file.size - _EDGE)))
            digest.update(file.size.to_bytes(8, "little"))
            for offset in [*range(0, file.size, _STRIDE), max(0, file.size - _PAGE)]:
                digest.update(os.pread(handle.fileno(), _PAGE, offset))
    except OSError as error:
        raise CheckpointError(f"{file.path} cannot be read: {error.strerror}") from error
    return f"v1:{digest.hexdigest()}"
