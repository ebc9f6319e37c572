"""Files of torch.save: find where their tensors lie, without torch and without running code from the pickle.

Such a file is a zip archive. Its `data.pkl` is a pickle that describes the tensors; each storage is an entry of its
own, not compressed.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..common.json_files import plain_size
from ..common.messages import shown
from ..common.notes import note
from ..errors import CheckpointError
from ..numerics.dtypes import DTYPE_BITS, TORCH_NAMES
from .lfs_pointer import check_no_pointer
from .safe_pickle import AGAIN, CURE, LIMIT, load_pickle, mapping, numbers
from .safetensors_file import TensorFile, TensorInfo, open_to_read

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FSDP_BIN = "pytorch_model_fsdp.bin"  # accelerate's name for a whole model that FSDP trained
ADAPTER_BIN = "adapter_model.bin"

_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")  # under which trainers put a model
_ENCRYPTED, _HAS_DESCRIPTOR = 1, 8  # flags of an entry
_STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ComplexFloatStorage": "C64",
}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None  # None: untyped


@dataclass(frozen=True)
class _Tensor:
    """A tensor as a pickle describes it."""

    storage: _Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    conj_or_neg: bool = False  # its values are the conjugate or the negative of its bytes


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: str | None = None
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    dtype = dtype or storage.dtype
    shape, strides, (offset,) = numbers(shape), numbers(strides), numbers((offset,))
    if dtype not in DTYPE_BITS or len(shape) != len(strides):
        raise ValueError(f"a tensor has dtype {dtype!r} and {len(strides)} strides")
    return _Tensor(storage, offset, shape, strides, dtype, conj_or_neg=bool(rest[2:] and rest[2]))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> _Tensor:
    return _rebuild_tensor(storage, offset, shape, strides, grad, hooks, *rest, dtype=dtype)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_from_type(rebuild: Any, cls: Any, arguments: Any, *_: Any) -> _Tensor:
    """Return a tensor without its Python attributes, which a model does not need."""
    if cls is not _Tensor or rebuild not in _REBUILD or not isinstance(arguments, tuple):
        raise ValueError("a tensor is not described as torch does")
    tensor: _Tensor = rebuild(*arguments)
    return tensor


def _persistent_load(pid: Any) -> _Storage:
    kind, dtype, key, _, _ = pid
    # torch writes keys as strings; litgpt writes integers, which torch.load accepts.
    if kind != "storage" or type(key) not in (str, int) or not isinstance(dtype, str):
        raise ValueError("a storage is not described as torch does")
    return _Storage(str(key), dtype or None)


def _arguments(*arguments: Any) -> tuple[Any, ...]:
    """Stand for what torch.load accepts beside tensors: bytes, sets, devices and the like. A set may hold tensors."""
    return arguments


_REBUILD = (_rebuild_tensor, _rebuild_tensor_v3)
_NO_TENSORS = (
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "Counter"),
    ("_codecs", "encode"),  # bytes
    *((module, name) for module in ("__builtin__", "builtins") for name in ("set", "bytearray", "complex")),
)
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): mapping,
    ("torch", "Size"): numbers,
    ("torch", "Tensor"): _Tensor,
    ("torch.nn.parameter", "Parameter"): _Tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch.storage", "UntypedStorage"): "",
    **{("torch", name): dtype for name, dtype in {**TORCH_NAMES, **_STORAGES}.items()},
    **dict.fromkeys(_NO_TENSORS, _arguments),
}


class _FileRange:
    """A range of an open file, as `zipfile` reads one: of a large file it reads the directory alone."""

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        self.descriptor, self.begin, self.size, self.position = descriptor, begin, size, 0

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + (0, self.position, self.size)[whence]
        if position < 0:
            # An OSError, which zipfile expects, and a ValueError.
            raise io.UnsupportedOperation("it refers to bytes before its first")
        self.position = position
        return position

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self.size - self.position)
        count = left if count is None or count < 0 else min(count, left)
        if count > LIMIT:
            raise ValueError(f"its directory or pickle has {count} bytes, more than {LIMIT}")
        content = os.pread(self.descriptor, count, self.begin + self.position)
        self.position += len(content)
        return content

    def read_at(self, offset: int, count: int) -> bytes:
        """Return `count` bytes at `offset`. Raises ValueError if there are fewer."""
        self.seek(offset)
        content = self.read(count)
        if len(content) < count:
            raise ValueError(f"it ends before byte {offset + count}")
        return content


class _Archive:
    """A zip archive of torch.save in a range of an open file."""

    def __init__(self, descriptor: int, begin: int, size: int, where: str) -> None:
        self.file = _FileRange(descriptor, begin, size)
        if self.file.read(2) == b"\x80\x02":
            raise CheckpointError(
                f"{where} is of the form that torch wrote before version 1.6; load it with torch and `torch.save` it"
                " again"
            )
        last = self.file.read_at(size - 22, 22)  # zipfile would search for the end further in front
        if not (last.startswith(b"PK\5\6") and last.endswith(b"\0\0")):
            raise ValueError("it does not end as a zip archive does")
        import zipfile  # slow to import, and few models need it

        try:
            with zipfile.ZipFile(self.file, metadata_encoding="utf-8") as archive:
                entries = archive.infolist()
                directory = archive.start_dir
        except zipfile.BadZipFile as error:
            raise ValueError(str(error)) from error
        self.entries = {entry.orig_filename: entry for entry in entries}
        if len(self.entries) < len(entries):
            ((name, _),) = Counter(entry.orig_filename for entry in entries).most_common(1)
            raise ValueError(f"it holds {name!r} twice")
        for name, entry in self.entries.items():
            if entry.compress_type or entry.flag_bits & _ENCRYPTED or entry.compress_size != entry.file_size:
                raise CheckpointError(
                    f"{where} is compressed, its {shown(name)!r} for one; load it with torch and `torch.save` it again"
                )
        # Where each entry must end: at the next one, or at the directory.
        self.limits = dict(pairwise(sorted({directory, *(entry.header_offset for entry in entries)})))
        if 0 not in self.limits:  # zipfile would skip bytes before the archive
            raise ValueError("it does not begin as a zip archive does")
        self.offsets: dict[str, int] = {}
        prefixes = [name.removesuffix("data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(prefixes) != 1:
            raise ValueError("it is a zip archive, but not one of torch: it has no data.pkl")
        self.prefix = prefixes[0]
        order = self.content("byteorder") if f"{self.prefix}byteorder" in self.entries else b"little"
        if order != b"little":
            raise CheckpointError(
                f"{where} was written in {shown(order.decode(errors='replace'))}-endian byte order;"
                " load it with torch on a little-endian machine and save it again"
            )
        self.object = load_pickle(self.content("data.pkl"), _GLOBALS, where, _persistent_load)

    def offset(self, name: str) -> int:
        """Return where an entry's bytes begin. Raises ValueError if its local header contradicts the directory."""
        if name in self.offsets:
            return self.offsets[name]
        entry = self.entries[name]
        signature, name_length, extra_length = struct.unpack("<4s22xHH", self.file.read_at(entry.header_offset, 30))
        begin: int = entry.header_offset + 30 + name_length + extra_length
        end = begin + entry.file_size
        if end > self.limits.get(entry.header_offset, 0):
            raise ValueError(f"its {name!r} is longer than its place")
        # Both lengths stand in this header alone. Were they damaged, we would read other bytes than the tensor's, so
        # check the descriptor that follows the bytes.
        descriptor = self.file.read_at(end, 4) if entry.flag_bits & _HAS_DESCRIPTOR else b"PK\7\10"
        local_name = self.file.read_at(entry.header_offset + 30, name_length)
        if (signature, local_name, descriptor) != (b"PK\3\4", name.encode(), b"PK\7\10"):
            raise ValueError(f"its {name!r} is not where its directory says")
        self.offsets[name] = begin
        return begin

    def content(self, name: str) -> bytes:
        """Return the bytes of a small entry. Raises ValueError if they do not have its checksum."""
        name = self.prefix + name
        entry = self.entries[name]
        content = self.file.read_at(self.offset(name), entry.file_size)
        if entry.CRC and zlib.crc32(content) != entry.CRC:  # torch can be set to write no checksums
            raise ValueError(f"its {name!r} is damaged: its check sum is another")
        return content

    def locate(self, name: str, tensor: _Tensor, file: str) -> TensorInfo:
        """Return where the bytes of a tensor are in the file. Raises ValueError if the archive does not hold them."""
        key = f"{self.prefix}data/{tensor.storage.key}"
        entry = self.entries.get(key)
        if entry is None:
            raise ValueError(f"its {key!r} is missing")
        width = DTYPE_BITS[tensor.dtype] // 8
        nbytes = math.prod(tensor.shape) * width
        first = tensor.offset * width
        if first + nbytes > entry.file_size:
            raise ValueError(f"it ends at byte {first + nbytes} of {key!r}, which has {entry.file_size}")
        return TensorInfo(name, tensor.dtype, tensor.shape, file, self.file.begin + self.offset(key) + first, nbytes)


def open_torch_file(path: Path, name: str) -> TensorFile:
    """List the tensors of a state dict in a file of torch.save, by name. No tensor is read.

    Raises CheckpointError for any other content, and for a file that is missing, truncated or malformed.
    """
    where = shown(path)
    try:
        size = plain_size(path)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
    check_no_pointer(path)
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)
        with _refusing(where):
            archive = _Archive(descriptor, 0, size, where)
            state, others = _state_dict(archive.object, where)
            tensors = [_tensor_info(archive, key, tensor, name, where) for key, tensor in state.items()]
    finally:
        os.close(descriptor)
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    more = ", …" if len(others) > 4 else ""
    listed = ", ".join(map(shown, others[:4])) + more
    left_out = note("not tensors", "left out of {where}, as they are no tensors: {names}", where=where, names=listed)
    notes = (left_out,) if others else ()
    return TensorFile(name, path, status.st_size, {}, tuple(tensors), status.st_mtime_ns, notes=notes)


def tensor_at(descriptor: int, begin: int, size: int, name: str, file: str, where: str) -> TensorInfo:
    """Return the one tensor of an archive in a range of an open file. Raises CheckpointError."""
    with _refusing(where):
        archive = _Archive(descriptor, begin, size, where)
        if not isinstance(archive.object, _Tensor):
            raise ValueError(f"it holds a {type(archive.object).__name__}, no tensor")
        return _tensor_info(archive, name, archive.object, file, where)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn every defect of an archive into a CheckpointError of one line."""
    try:
        yield
    except (ValueError, LookupError, OverflowError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{where} is no whole file of torch.save: {shown(error, 200)}; {AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error


def _state_dict(content: Any, where: str) -> tuple[dict[str, _Tensor], list[str]]:
    """Return the tensors of a state dict by name, and the keys of everything else."""
    clean: set[int] = set()
    if not isinstance(content, dict) or (content and not _holds_data(content, clean)):
        raise CheckpointError(f"{where} holds no mapping of names to tensors; {CURE}")
    others: list[str] = []
    models = [key for key in _MODEL_KEYS if isinstance(content.get(key), dict) and _holds_data(content[key], clean)]
    if len(models) == 1:
        beside = {key: value for key, value in content.items() if key != models[0]}
        other = next((key for key, value in beside.items() if _holds_data(value, clean)), None)
        if other is not None:
            raise CheckpointError(
                f"{where} holds more than a model: tensors under {shown(other)!r}, beside {models[0]!r}; load it with"
                f" torch, and `torch.save` what is under {models[0]!r} alone"
            )
        content, others = content[models[0]], [str(key) for key in beside]
    tensors: dict[str, _Tensor] = {}
    for key, value in content.items():
        if isinstance(value, _Tensor) and isinstance(key, str):
            tensors[key] = value
        elif not _holds_data(value, clean):
            others.append(str(key))
        elif not isinstance(key, str):
            raise CheckpointError(f"{where} holds something under {shown(key)}, which is no name; {CURE}")
        else:
            kind = "a mapping" if isinstance(value, dict) else "a storage or a list of tensors"
            raise CheckpointError(
                f"{where} holds {kind} under {shown(key)!r}; load it with torch and `torch.save` the mapping of names"
                " to tensors alone"
            )
    return tensors, others


def _holds_data(value: Any, clean: set[int]) -> bool:
    """Whether a value holds a tensor or a storage at any depth.

    `clean` collects the ids of containers that hold none, so that each is searched once.
    """
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


def _tensor_info(archive: _Archive, key: str, tensor: _Tensor, file: str, where: str) -> TensorInfo:
    """Return where a tensor is in the file. Raises CheckpointError unless its bytes are its values, row by row."""
    if tensor.conj_or_neg:
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
        return archive.locate(key, tensor, file)
    except ValueError as error:
        raise ValueError(f"tensor {key!r}: {error}") from error
