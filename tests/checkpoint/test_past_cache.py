"""Reads past the page cache: the same bytes, whatever the filesystem offers and however little it reads at once."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import files_of, random_state, write_model
from mergekit_imm import merge_checkpoints
from mergekit_imm.checkpoint import reader
from mergekit_imm.checkpoint.checkpoint import Checkpoint
from mergekit_imm.checkpoint.reader import Files
from mergekit_imm.checkpoint.safetensors_file import TensorFile, TensorInfo
from mergekit_imm.common import pages
from mergekit_imm.errors import ChangedError, CheckpointError

PAGE = pages.PAGE


def _files(path: Path, tensor: TensorInfo) -> Files:
    file = TensorFile(path.name, path, path.stat().st_size, {}, (tensor,), 0)
    model = Checkpoint("base", str(path), path.parent, {path.name: file}, {tensor.name: tensor}, None, {}, ())
    return Files({"base": model}, past_cache=True)


def _tensor(begin: int, count: int) -> TensorInfo:
    return TensorInfo("w", "U8", (count,), "file.safetensors", begin, count)


@settings(max_examples=150)
@given(
    begin=st.integers(0, 3 * PAGE),
    count=st.integers(1, 40 * PAGE),
    after=st.integers(0, 2 * PAGE),
    at=st.integers(0, 2 * PAGE).map(lambda at: at // 8 * 8),
    first=st.integers(0, PAGE),
    direct=st.sampled_from(["offered", "refused", "later refused", "short", "odd"]),
    cached=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_range_is_read_whole(
    begin: int, count: int, after: int, at: int, first: int, direct: str, cached: bool, seed: int
) -> None:
    first = min(first, count - 1)
    generator, preadv = random.Random(seed), os.preadv
    content = generator.randbytes(begin + count + after)

    def some(descriptor: int, buffers: list[Any], offset: int) -> int:
        if direct == "offered" or descriptor not in opened:
            return preadv(descriptor, buffers, offset)
        if direct == "later refused" and generator.random() < 0.5:
            raise OSError(errno.EINVAL, "Invalid argument")
        unit = 512 if direct == "odd" else PAGE
        least = generator.randrange(unit, len(buffers[0]) + 1) // unit * unit
        return preadv(descriptor, [buffers[0][:least]], offset)

    opened: list[int] = []

    def open_direct(path: Path, flags: int) -> int | None:
        found = None if direct == "refused" else pages.open_direct(path, flags)
        opened.extend([] if found is None else [found])
        return found

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        path.write_bytes(content)
        tensor = _tensor(begin, count)
        buffer = np.full(at + count + 5 * PAGE, 7, np.uint8)
        size = count - first
        with (
            patch.object(reader, "ANNOUNCED", 1),
            patch.object(reader, "ROOM", 7 * PAGE),
            patch.object(pages, "is_cached", lambda *_: cached),
            patch.object(reader, "pages", _Pages(open_direct)),
            patch.object(os, "preadv", some),
            _files(path, tensor) as files,
        ):
            found = files.read_placed("base", tensor, first, size, buffer, at)
            used = files._open[path].direct is not None
            plain = np.empty(size, np.uint8)
            files.read("base", tensor, first, plain)
        if direct in ("offered", "short"):
            assert used == bool(opened)
        assert buffer[found : found + size].tobytes() == content[begin + first : begin + count]
        assert plain.tobytes() == content[begin + first : begin + count]
        assert at <= found
        assert buffer[found:].ctypes.data % 8 == 0 == buffer.ctypes.data % 8
        assert (buffer[:at] == 7).all()
        assert (buffer[at + size + 3 * PAGE :] == 7).all()


class _Pages:
    """The module `pages` with another way to open."""

    def __init__(self, open_direct: Any) -> None:
        self.open_direct = open_direct

    def __getattr__(self, name: str) -> Any:
        return getattr(pages, name)


def test_a_file_cut_off_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(bytes(64 * PAGE))
    tensor = _tensor(8, 63 * PAGE)
    with _files(path, tensor) as files, patch.object(pages, "is_cached", lambda *_: False):
        buffer = np.empty(70 * PAGE, np.uint8)
        files.read_placed("base", tensor, 0, 32 * PAGE, buffer, 0)
        os.truncate(path, 20 * PAGE)
        with pytest.raises(ChangedError, match="ended at byte"):
            files.read_placed("base", tensor, 0, 32 * PAGE, buffer, 0)


def test_a_failing_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(bytes(64 * PAGE))

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(pages, "is_cached", lambda *_: False)
    with _files(path, _tensor(0, 64 * PAGE)) as files, pytest.raises(CheckpointError, match="Input/output error"):
        files.read_placed("base", _tensor(0, 64 * PAGE), 0, 32 * PAGE, np.empty(70 * PAGE, np.uint8), 0)


def test_models_larger_than_memory_merge_to_the_same_bytes(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (1001, 333), "model.layers.0.w": (1500, 1001), "model.norm.weight": (5,)}
    for role, seed in (("base", 0), ("start", 1), ("sft", 2)):
        write_model(tmp_path / role, random_state(shapes, seed=seed))
    folders = [tmp_path / name for name in ("base", "sft")]
    begin = {"start": tmp_path / "start", "iteration": 1}
    merge_checkpoints(*folders, tmp_path / "small", **begin)  # type: ignore[call-overload]
    read: list[int] = []
    placed = pages.place

    def place(buffer: Any, at: int, offset: int) -> int:
        read.append(offset)
        return placed(buffer, at, offset)

    with (
        patch.object(pages, "is_cached", lambda *_: False),
        patch.object(pages, "place", place),
        patch("mergekit_imm.engine.workers.room_for_cache", lambda: 0),
    ):
        merge_checkpoints(*folders, tmp_path / "large", **begin)  # type: ignore[call-overload]
    if pages.open_direct(tmp_path / "base" / "model.safetensors", os.O_RDONLY) is not None:
        assert len(read) >= 3
    assert files_of(tmp_path / "large") == files_of(tmp_path / "small")


def _resident(descriptor: int, size: int) -> bool:
    """Whether most of a file is in the page cache, by mincore(2)."""
    pages_of = np.zeros(size // PAGE, np.uint8)
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        address = view.ctypes.data
        places = (ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(pages_of.ctypes.data))
        assert pages.libc.mincore(*places) == 0
        del view  # a mapping in use cannot be closed
    return 2 * int((pages_of & 1).sum()) >= len(pages_of)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_what_is_in_the_cache_is_known(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 64 * PAGE
    path.write_bytes(bytes(size))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if pages.libc.syscall(pages._CACHESTAT, descriptor, (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)(), 0) != 0:
            pytest.skip("this kernel does not say what is in the cache")
        os.fsync(descriptor)
        assert pages.is_cached(descriptor, 0, size) is _resident(descriptor, size) is True
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert pages.is_cached(descriptor, 0, size) is _resident(descriptor, size)
    finally:
        os.close(descriptor)
