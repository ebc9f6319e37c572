"""Where the bytes go: the files of an output, the offset of every tensor in them, and the index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .checkpoint.source import Checkpoint
from .checkpoint.tensorfile import DTYPE_BITS, MODEL, TensorInfo, build_header

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
) -> tuple[dict[str, TensorInfo], tuple[OutputFile, ...], bytes | None]:
    """Give every output tensor its file and offset: name -> tensor, the files, the index if there is one.

    Without `max_shard_size` the base's own files and order; a tensor that the base does not store goes to the end
    of the base file that its `file` names. A base of another form than safetensors files is laid out anew.
    """
    if max_shard_size is None and not base.laid_out:
        max_shard_size = SHARD_SIZE
    if max_shard_size is None:
        shards = _as_in_base(outs, base)
        names = list(base.files) if base.indexed else [MODEL]
    else:
        shards = _anew(outs, max_shard_size, next(iter(base.files.values())).metadata)
        total = len(shards)
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)] if total > 1 else [MODEL]
    placed: dict[str, TensorInfo] = {}
    files = []
    for name, (metadata, tensors) in zip(names, shards, strict=True):
        ordered = _aligned(tensors)
        head, begins, size = build_header(
            ((t.name, t.dtype, t.shape, t.nbytes) for t in ordered), {**metadata, "format": "pt"}
        )
        files.append(OutputFile(name, head, size))
        placed |= {t.name: replace(t, file=name, begin=begin) for t, begin in zip(ordered, begins, strict=True)}
    return placed, tuple(files), None if names == [MODEL] else _index(placed)


def _index(placed: dict[str, TensorInfo]) -> bytes:
    content = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in placed.values())},
        "weight_map": {name: placed[name].file for name in sorted(placed)},
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _as_in_base(outs: Sequence[TensorInfo], base: Checkpoint) -> list[Shard]:
    left = {out.name: out for out in outs}
    homes = {
        file.name: [left.pop(tensor.name) for tensor in file.tensors if tensor.name in left]
        for file in base.files.values()
    }
    for out in left.values():
        homes[out.file].append(out)
    return [(base.files[name].metadata, tensors) for name, tensors in homes.items()]


def _anew(outs: Sequence[TensorInfo], limit: int, metadata: dict[str, str]) -> list[Shard]:
    shards: list[Shard] = [(metadata, [])]
    size = 0
    for out in outs:
        if shards[-1][1] and size + out.nbytes > limit:
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
