"""torch.distributed.checkpoint folders: a `.metadata` pickle, and files of pieces, each in torch.save format.

From the pickle only the locations of tensors are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.json_files import read_small
from ..common.messages import shown
from ..errors import CheckpointError
from ..model.tensor_names import unwrapped
from ..numerics.dtypes import TORCH_NAMES
from .lazy_tensor import Tensor
from .lfs_pointer import check_no_pointer
from .safe_pickle import AGAIN, Stub, load_pickle, mapping, numbers
from .safetensors_file import TensorFile, TensorInfo, is_plain_name, open_to_read, stamp
from .sharded import PlacedTensor, joined_pieces
from .torch_file import tensor_at

METADATA = ".metadata"
FSDP_FOLDER = "pytorch_model_fsdp_0/"  # where accelerate keeps a sharded checkpoint
# Training state that is stored with a model.
_TRAINING_STATE = (
    "optimizer optimizers optim optimizer_states lr_scheduler lr_schedulers scheduler dataloader train_state rng_state"
    " rng_states extra_state"
).split()


class _Tensors(Stub):
    """Stands for TensorStorageMetadata."""

    __slots__ = ()


class _Index(Stub):
    """Stands for MetadataIndex: a tensor's name and a piece's offsets."""

    __slots__ = ()


class _Place(Stub):
    """Stands for _StorageInfo: the file and bytes of a piece."""

    __slots__ = ()


def _ignored(*_: Any) -> None:
    return None


_HERE, _BEFORE = "torch.distributed.checkpoint", "torch.distributed._shard.sharded_tensor.metadata"
_KNOWN: dict[tuple[str, str], Any] = {
    (f"{_HERE}.metadata", "TensorStorageMetadata"): _Tensors,
    (f"{_HERE}.metadata", "MetadataIndex"): _Index,
    (f"{_HERE}.filesystem", "_StorageInfo"): _Place,
    **{
        (f"{_HERE}.metadata", name): Stub
        for name in ("Metadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta")
    },
    (f"{_HERE}.metadata", "_MEM_FORMAT_ENCODING"): _ignored,
    (_BEFORE, "TensorProperties"): Stub,  # until torch 2.3
    (_BEFORE, "MEM_FORMAT_ENCODING"): _ignored,
    ("torch.serialization", "_get_layout"): _ignored,
    ("builtins", "getattr"): _ignored,  # Python 3.11.0 to 3.11.3 pickles enum members with it
    ("collections", "OrderedDict"): mapping,
    ("torch", "Size"): numbers,
    **{("torch", name): dtype for name, dtype in TORCH_NAMES.items()},
    **{
        (module, name): _ignored
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


def open_dcp(
    folder: Path, prefix: str, role: str, where: str
) -> tuple[dict[str, TensorFile], dict[str, Tensor], tuple[str, ...]]:
    """Read the metadata of a torch.distributed checkpoint. Reads no tensor.

    `prefix` is its place in the folder, "" or "name/". Returns its files by name, the model's tensors by name, and
    what else it stores. Raises CheckpointError for pieces that are missing or cut off, and for anything unknown.
    """
    path = folder / prefix / METADATA
    try:
        size, written = stamp(path)
        content = read_small(path)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}; {AGAIN}") from error
    check_no_pointer(path, content)
    found = load_pickle(content, _KNOWN, shown(path))
    try:
        stored, paths, places = _sections(found)
        names, left = _names(stored, paths, where)
        wanted = [piece for name, key in names.items() for piece in _pieces(name, key, stored[key], places)]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{shown(path)} is damaged or of an unknown version: {shown(error, 200)}; {AGAIN}"
        ) from error
    parts, files = _located(wanted, folder, prefix)
    tensors = {
        name: joined_pieces(name, numbers(stored[key].get("size")), parts[name], role, where)
        for name, key in names.items()
    }
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors of a model, only {', '.join(left) or 'an empty state'}")
    return (
        {f"{prefix}{METADATA}": TensorFile(f"{prefix}{METADATA}", path, size, {}, (), written), **files},
        tensors,
        left,
    )


def _sections(found: Any) -> tuple[dict[str, _Tensors], Mapping[str, Any], dict[tuple[str, Any], _Place]]:
    """Split metadata into what is stored, the path of each name, and the place of each piece."""
    stored = found.get("state_dict_metadata")
    paths = found.get("planner_data")
    places: dict[tuple[str, Any], _Place] = {}
    for index, place in found.get("storage_data").items():
        if not isinstance(index, _Index) or not isinstance(place, _Place):
            raise ValueError("storage_data has an unknown form")
        offset = index.get("offset")
        places.setdefault((str(index.get("fqn")), None if offset is None else numbers(offset)), place)
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise ValueError("state_dict_metadata has an unknown form")
    return stored, paths if isinstance(paths, dict) else {}, places


def _names(stored: Mapping[str, Any], paths: Mapping[str, Any], where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the key in the metadata of each of the model's tensors, and what else is stored."""

    def path_of(key: str) -> tuple[str, ...]:
        path = paths.get(key, (key,))
        if not isinstance(path, tuple) or not path or not all(isinstance(part, str | int) for part in path):
            raise ValueError(f"the path of {key!r} has an unknown form")
        return tuple(map(str, path))

    split = {key: path_of(key) for key in stored}
    # {"model": …} or {"app": {"model": …}}; a model stored alone has no such prefix.
    heads = {
        path[: at + 1]
        for path in split.values()
        for at in (0, 1)
        if len(path) > at + 1 and path[at] == "model" and path[0] not in _TRAINING_STATE
    }
    head = min(heads, key=len, default=())
    if sum(len(each) == len(head) for each in heads) > 1:
        raise CheckpointError(f"{where} holds several models, {' and '.join(map('.'.join, sorted(heads)))}")
    names: dict[str, str] = {}
    left: Counter[str] = Counter()
    for key, path in split.items():
        if path[: len(head)] != head or (not head and path[0] in _TRAINING_STATE):
            left[f"{path[0]}.*" if len(path) > 1 else path[0]] += 1
            continue
        if not isinstance(stored[key], _Tensors):
            left[key] += 1
            continue
        name = unwrapped(".".join(path[len(head) :]))
        if name in names:
            raise CheckpointError(
                f"{where} holds tensor '{shown(name)}' twice, as '{shown(names[name])}' and as '{shown(key)}'; save the"
                " model without wrappers around its modules"
            )
        names[name] = key
    return names, tuple(f"{name} ({count} entries)" if count > 1 else name for name, count in sorted(left.items()))


_Wanted = tuple[str, tuple[int, ...], tuple[int, ...], str, _Place]  # name, offsets, sizes, dtype, where it is


def _pieces(name: str, key: str, stored: _Tensors, places: Mapping[tuple[str, Any], _Place]) -> list[_Wanted]:
    dtype = stored.get("properties").state[0]
    shape = numbers(stored.get("size"))
    found = []
    for chunk in stored.get("chunks"):
        offsets, sizes = numbers(chunk.get("offsets")), numbers(chunk.get("sizes"))
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"a piece of {key!r} has another number of dimensions")
        place = places.get((key, offsets))
        if place is None:
            raise ValueError(f"the piece of {key!r} at {list(offsets)} is in no file")
        found.append((name, offsets, sizes, dtype, place))
    if not found:
        raise ValueError(f"{key!r} has no pieces")
    return found


def _located(
    wanted: list[_Wanted], folder: Path, prefix: str
) -> tuple[dict[str, list[PlacedTensor]], dict[str, TensorFile]]:
    """Locate pieces on disk: the pieces of each tensor, and the files that hold them."""
    by_file: dict[str, list[_Wanted]] = {}
    for piece in wanted:
        file = piece[-1].get("relative_path")
        if not is_plain_name(file):
            raise CheckpointError(
                f"{shown(folder / prefix / METADATA)} names '{shown(file)}'; only plain names of files beside it are"
                " allowed"
            )
        by_file.setdefault(file, []).append(piece)
    parts: dict[str, list[PlacedTensor]] = {}
    files = {}
    for file, pieces in sorted(by_file.items()):
        path = folder / prefix / file
        if not path.is_file():
            raise CheckpointError(
                f"{shown(path)} is missing or not a plain file, though its {METADATA} names it; {AGAIN}"
            )
        check_no_pointer(path)
        descriptor = open_to_read(path)
        try:
            status = os.fstat(descriptor)
            infos = [_located_one(descriptor, status.st_size, piece, f"{prefix}{file}", path) for piece in pieces]
        finally:
            os.close(descriptor)
        for piece, info in zip(pieces, infos, strict=True):
            parts.setdefault(piece[0], []).append((info, piece[1]))
        tensors = tuple(sorted(infos, key=lambda info: (info.begin, info.nbytes)))
        files[f"{prefix}{file}"] = TensorFile(f"{prefix}{file}", path, status.st_size, {}, tensors, status.st_mtime_ns)
    return parts, files


def _located_one(descriptor: int, size: int, piece: _Wanted, file: str, path: Path) -> TensorInfo:
    name, _, sizes, dtype, place = piece
    where = f"{shown(path)}, tensor '{shown(name)}',"
    begin, length = place.get("offset"), place.get("length")
    if place.get("transform_descriptors"):
        raise CheckpointError(
            f"{where} was compressed or transformed by an extension when it was saved; save it without extensions"
        )
    if type(begin) is not int or type(length) is not int or not 0 <= begin <= begin + length <= size:
        raise CheckpointError(
            f"{where} should begin at byte {shown(begin)} and have {shown(length)} bytes, but the file has {size}; it"
            f" was cut off or is still being written: {AGAIN}"
        )
    info = tensor_at(descriptor, begin, length, name, file, where)
    if (info.dtype, info.shape) != (dtype, sizes):
        raise CheckpointError(
            f"{where} is {info.dtype} {list(info.shape)}, but {METADATA} says {shown(dtype)} {list(sizes)}; {AGAIN}"
        )
    return info
