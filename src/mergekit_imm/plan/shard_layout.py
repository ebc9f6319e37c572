"""Where the bytes go: the files of an output, the offset of every tensor in them, and the index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.parts import Part, index_of, stem_of
from ..checkpoint.safetensors_file import DTYPE_BITS, TensorInfo, build_header
from ..checkpoint.sharded import are_shards

SHARD_SIZE = 5_000_000_000  # bytes of a file, where the base has none to go by: what transformers long had
Shard = tuple[dict[str, str], list[TensorInfo]]  # metadata, tensors in order


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written: its first bytes and its size."""

    name: str
    head: bytes
    size: int


def lay_out(
    outs: Sequence[TensorInfo], base: Checkpoint, max_shard_size: int | None
) -> tuple[dict[str, TensorInfo], tuple[OutputFile, ...], dict[str, bytes]]:
    """Give every output tensor its file and offset: name -> tensor, the files, and the indexes by their path.

    A tensor's `file` is the one of the base that it goes to, at the end if the base does not store it, or one that the
    base does not have. Without `max_shard_size` the base's own files and order; what it has in another form than
    safetensors files is laid out anew.
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
        as_it_is = max_shard_size is None and all(file.endswith(".safetensors") for file in part.files)
        as_it_is = as_it_is and not are_shards(part.files) and part.files[0] in known
        if as_it_is:
            shards = _as_in_base(own, base, part)
            # A single file at the top is the model, whatever it was called, or a component of a pipeline.
            alone = not (part.index or part.beside or part.folder)
            names = [f"{part.stem}.safetensors"] if alone else list(part.files)
            index = part.index
        else:
            first = base.files.get(part.files[0])
            limit = None if part.beside else max_shard_size or SHARD_SIZE
            shards = _anew(own, limit, {} if first is None else first.metadata)
            stem, total = f"{part.folder}{part.stem}", len(shards)
            several = [f"{stem}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
            names = several if total > 1 else [f"{stem}.safetensors"]
            index = index_of(part.folder, part.stem) if total > 1 else None
        of_index: dict[str, TensorInfo] = {}
        for name, (metadata, tensors) in zip(names, shards, strict=True):
            ordered = _aligned(tensors)
            head, begins, size = build_header(
                ((t.name.removeprefix(part.folder), t.dtype, t.shape, t.nbytes) for t in ordered),
                {**metadata, "format": "pt"},
            )
            files.append(OutputFile(name, head, size))
            of_index |= {t.name: replace(t, file=name, begin=begin) for t, begin in zip(ordered, begins, strict=True)}
        placed |= of_index
        if index is not None:
            indexes[index] = _index(of_index, part.folder)
    return placed, tuple(files), indexes


def _index(placed: dict[str, TensorInfo], folder: str) -> bytes:
    content = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in placed.values())},
        "weight_map": {name.removeprefix(folder): placed[name].file.removeprefix(folder) for name in sorted(placed)},
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _as_in_base(outs: Sequence[TensorInfo], base: Checkpoint, part: Part) -> list[Shard]:
    left = {out.name: out for out in outs}
    homes = {
        name: [left.pop(tensor.name) for tensor in base.files[name].tensors if tensor.name in left]
        for name in part.files
    }
    for out in left.values():
        homes[out.file].append(out)
    return [(base.files[name].metadata, tensors) for name, tensors in homes.items()]


def _anew(outs: Sequence[TensorInfo], limit: int | None, metadata: dict[str, str]) -> list[Shard]:
    shards: list[Shard] = [(metadata, [])]
    size = 0
    for out in outs:
        if limit is not None and shards[-1][1] and size + out.nbytes > limit:
            shards.append((metadata, []))
            size = 0
        shards[-1][1].append(out)
        size += out.nbytes
    return shards


def _aligned(tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Keep the order, unless it would put a tensor where its dtype cannot be read in place: then widest first."""
    end = 0
    for tensor in tensors:
        if end % max(1, DTYPE_BITS[tensor.dtype] // 8):
            return sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])
        end += tensor.nbytes
    return tensors
