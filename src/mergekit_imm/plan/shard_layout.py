"""Lay out an output: its files, the offset of every tensor, and the indexes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.model_files import Part, are_shards, index_of, stem_of
from ..checkpoint.safetensors_file import TensorInfo, build_header
from ..numerics.dtypes import DTYPE_BITS
from ..options.recipe import to_json

SHARD_SIZE = 5_000_000_000  # bytes per file when the base has no layout to follow; long the default of transformers
FileContent = tuple[dict[str, str], list[TensorInfo]]  # metadata, tensors in order


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to write: its first bytes (length and header) and its size."""

    name: str
    head: bytes
    size: int


def lay_out(
    outs: Sequence[TensorInfo], base: Checkpoint, max_shard_size: int | None
) -> tuple[dict[str, TensorInfo], tuple[OutputFile, ...], dict[str, bytes]]:
    """Give every output tensor its file and offset. Returns tensors by name, the files, and the indexes by path.

    Each tensor names the file to go to, one of the base's or a new one; tensors that the base lacks come last in it.
    Without `max_shard_size` files and order are the base's; what the base stores in another format gets a new layout.
    """
    placed: dict[str, TensorInfo] = {}
    files = []
    indexes = {}
    known = {file for part in base.parts for file in part.files}
    new = [file for file in dict.fromkeys(out.file for out in outs) if file not in known]
    for part in (*base.parts, *(Part((file,), stem_of(file), beside=True) for file in new)):
        of_part = {*part.files}
        own = [out for out in outs if out.file in of_part]
        if not own and part.beside:
            continue
        keeps_layout = max_shard_size is None and all(file.endswith(".safetensors") for file in part.files)
        keeps_layout = keeps_layout and not are_shards(part.files) and part.files[0] in known
        if keeps_layout:
            shards = _as_in_base(own, base, part)
            # A single file at the top level is the model or a component, whatever its name.
            is_single = not (part.index or part.beside or part.folder)
            names = [f"{part.stem}.safetensors"] if is_single else list(part.files)
            index = part.index
        else:
            first = base.files.get(part.files[0])
            limit = None if part.beside else max_shard_size or SHARD_SIZE
            shards = _new_shards(own, limit, {} if first is None else first.metadata)
            stem, total = f"{part.folder}{part.stem}", len(shards)
            several = [f"{stem}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
            names = several if total > 1 else [f"{stem}.safetensors"]
            index = index_of(part.folder, part.stem) if total > 1 else None
        of_index: list[TensorInfo] = []
        folder = part.folder
        for name, (metadata, tensors) in zip(names, shards, strict=True):
            ordered = aligned(tensors)
            head, begins, size = build_header(
                ((t.name.removeprefix(folder), t.dtype, t.shape, t.nbytes) for t in ordered),
                {**metadata, "format": "pt"},
            )
            files.append(OutputFile(name, head, size))
            for t, begin in zip(ordered, begins, strict=True):
                is_there = t.begin == begin and t.file == name  # as in the base
                of_index.append(t if is_there else TensorInfo(t.name, t.dtype, t.shape, name, begin, t.nbytes))
        for each in of_index:
            placed[each.name] = each
        if index is not None:
            indexes[index] = _index(of_index, folder)
    return placed, tuple(files), indexes


def _index(placed: list[TensorInfo], folder: str) -> bytes:
    names = sorted(placed, key=attrgetter("name"))
    return to_json(
        {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in placed)},
            "weight_map": {each.name.removeprefix(folder): each.file.removeprefix(folder) for each in names},
        }
    )


def _as_in_base(outs: Sequence[TensorInfo], base: Checkpoint, part: Part) -> list[FileContent]:
    left = {out.name: out for out in outs}
    by_file = {
        name: [left.pop(tensor.name) for tensor in base.files[name].tensors if tensor.name in left]
        for name in part.files
    }
    for out in left.values():
        by_file[out.file].append(out)
    return [(base.files[name].metadata, tensors) for name, tensors in by_file.items()]


def _new_shards(outs: Sequence[TensorInfo], limit: int | None, metadata: dict[str, str]) -> list[FileContent]:
    shards: list[FileContent] = [(metadata, [])]
    size = 0
    for out in outs:
        if limit is not None and shards[-1][1] and size + out.nbytes > limit:
            shards.append((metadata, []))
            size = 0
        shards[-1][1].append(out)
        size += out.nbytes
    return shards


def aligned(tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Keep the order unless it would misalign a tensor for its dtype; then sort by width, widest first."""
    end = 0
    for tensor in tensors:
        if end % max(1, DTYPE_BITS[tensor.dtype] // 8):
            return sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])
        end += tensor.nbytes
    return tensors
