"""Tensors that training ranks stored in pieces, assembled into whole ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..common.json_files import parse_json
from ..common.messages import shown
from ..errors import CheckpointError
from ..numerics.dtypes import DTYPE_BITS
from .lazy_tensor import Piece, Pieces, Tensor, renamed
from .safetensors_file import TensorFile, TensorInfo

SHARDING = "DCP_SHARDING_INFO"  # metadata key of torch.distributed.checkpoint's HuggingFaceStorageWriter
_OWN = (SHARDING, "DCP_VERSION")

PlacedTensor = tuple[TensorInfo, tuple[int, ...]]  # a piece, and where in the tensor it begins
_Box = tuple[tuple[int, ...], tuple[int, ...]]  # begin and end


def from_shards(
    files: Mapping[str, TensorFile], role: str, where: str
) -> tuple[dict[str, TensorFile], dict[str, Tensor]]:
    """Return the files without their sharding metadata, and the whole tensors by name.

    Raises CheckpointError if the pieces of a tensor do not fill it.
    """
    parts: dict[str, list[PlacedTensor]] = {}
    for file in files.values():
        places = _places(file, f"{where}: {shown(file.name)}")
        for tensor in file.tensors:
            parts.setdefault(tensor.name, []).append((tensor, places[tensor.name]))
    tensors = {}
    for name, found in parts.items():
        dimensions = {len(place) for part, at in found for place in (part.shape, at)}
        if len(dimensions) > 1 or len({at for _, at in found}) < len(found):
            raise CheckpointError(
                f"{where}: the pieces of tensor '{shown(name)}' differ in number of dimensions, or two begin at one"
                " place; copy it again"
            )
        ends = [map(sum, zip(part.shape, place, strict=True)) for part, place in found]
        tensors[name] = joined_pieces(name, tuple(map(max, zip(*ends, strict=True))), found, role, where)
    kept = {
        name: replace(file, metadata={key: value for key, value in file.metadata.items() if key not in _OWN})
        for name, file in files.items()
    }
    return kept, tensors


def _places(file: TensorFile, where: str) -> dict[str, tuple[int, ...]]:
    try:
        entries: Any = parse_json(file.metadata[SHARDING].encode())
        places = {name: tuple(entry["saved_offsets"]) for name, entry in entries.items()}
        if not all(type(number) is int and number >= 0 for place in places.values() for number in place):
            raise ValueError("an offset is not a number")
        if set(places) != {tensor.name for tensor in file.tensors}:
            raise ValueError("it does not match the tensors of this file")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{where} has no {SHARDING} or a damaged one: {shown(error, 200)}; copy it again"
        ) from error
    return places


def joined_pieces(name: str, shape: tuple[int, ...], parts: Sequence[PlacedTensor], role: str, where: str) -> Tensor:
    """Return the tensor that pieces make up. Raises CheckpointError unless they fill it without overlap.

    Pieces of one size at one place are copies: one is read. Empty pieces are skipped.
    """
    if len({part.dtype for part, _ in parts}) > 1:
        raise CheckpointError(f"{where}: the pieces of tensor '{shown(name)}' have different dtypes; copy it again")
    boxes: dict[_Box, TensorInfo] = {}
    for part, place in parts:
        if part.count or len(parts) == 1:
            boxes.setdefault((place, tuple(map(sum, zip(place, part.shape, strict=True)))), part)
    whole = (0,) * len(shape), shape
    if not boxes and 0 in shape:  # an empty tensor
        return replace(parts[0][0], name=name, shape=shape)
    if not boxes or not _fill(*whole, list(boxes)):
        raise CheckpointError(
            f"{where}: tensor '{shown(name)}', {list(shape)}, is stored in {len(boxes)} pieces that do not fill it or"
            " overlap; is the file of a rank missing? copy it again"
        )
    if whole in boxes:
        return renamed(boxes[whole], name)
    if DTYPE_BITS[parts[0][0].dtype] % 8:
        raise CheckpointError(
            f"{where}: tensor '{shown(name)}' is {parts[0][0].dtype} in pieces, which is not supported; save it whole"
        )
    return Pieces(name, shape, tuple(Piece(role, part, place) for (place, _), part in boxes.items()))


def _fill(begin: tuple[int, ...], end: tuple[int, ...], boxes: list[_Box], depth: int = 64) -> bool:
    """Whether boxes tile a larger one exactly: cut it between them, recursively, until each is alone."""
    if len(boxes) == 1:
        return boxes[0] == (begin, end)
    if depth == 0:
        return False
    for axis in range(len(begin)):
        boxes.sort(key=lambda box: box[0][axis])
        groups = [boxes[:1]]
        reached = boxes[0][1][axis]
        for box in boxes[1:]:
            if box[0][axis] >= reached:
                groups.append([])
            groups[-1].append(box)
            reached = max(reached, box[1][axis])
        if len(groups) > 1:
            cuts = [begin[axis], *(group[0][0][axis] for group in groups[1:]), end[axis]]
            return all(
                _fill(_with(begin, axis, low), _with(end, axis, high), group, depth - 1)
                for group, low, high in zip(groups, cuts, cuts[1:], strict=False)
            )
    return False


def _with(place: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*place[:axis], value, *place[axis + 1 :])
