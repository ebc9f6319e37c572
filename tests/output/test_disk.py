"""Bytes on their way to the disk: the same whatever the filesystem offers and the system calls return."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import files_of, random_state, write_model
from commands import subprocess_of
from mergekit_imm import OutputError, merge_checkpoints
from mergekit_imm.common import pages
from mergekit_imm.output import direct_io

# A block of odd tensors, so that pieces share pages, and one that spans several segments.
SHAPES = {"a": (3,), "model.layers.0.w": (1500, 1001), "model.layers.0.b": (1,), "z": (4099,)}


@pytest.fixture(params=["disk", "memory"])
def place_of(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on the disk, or on a filesystem in memory, which goes another way."""
    if request.param == "disk":
        yield tmp_path
        return
    if not Path("/dev/shm").is_dir():
        pytest.skip("no tmpfs")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def write_in_pieces(path: Path, content: bytes, cuts: list[int], aligned: bool, seed: int) -> bytes:
    """Write a file in pieces, in any order, from two threads; return what is in it then."""
    handle = direct_io.open_output(path, len(content))
    try:
        bounds = [0, *sorted(cuts), len(content)]
        pieces = list(itertools.pairwise(bounds))
        random.Random(seed).shuffle(pieces)

        def write(some: list[tuple[int, int]]) -> None:
            buffer = np.empty(len(content) + 2 * pages.PAGE, np.uint8)
            for first, end in some:
                at = pages.place(buffer, 5, first) if aligned else 5
                buffer[at : at + end - first] = np.frombuffer(content[first:end], np.uint8)
                direct_io.write_at(handle, memoryview(buffer[at : at + end - first]), first)  # type: ignore[arg-type]

        threads = [threading.Thread(target=write, args=(pieces[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        direct_io.sync_output(handle)
    finally:
        handle.close()
    return path.read_bytes()


@settings(deadline=None, max_examples=60)
@given(
    page=st.sampled_from([4096, 16384, 65536]),
    size=st.integers(0, 10),
    cuts=st.lists(st.integers(0, 10), max_size=12),
    odd=st.integers(-3, 4095),
    aligned=st.booleans(),
    direct=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_pieces_in_any_order_make_the_file(
    page: int, size: int, cuts: list[int], odd: int, aligned: bool, direct: bool, seed: int
) -> None:
    """Whatever the size of a page, where it is no smaller than this system's."""
    size = max(0, size * page + odd)
    content = random.Random(seed).randbytes(size)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(pages, "_is_local", (lambda _: False) if not direct else pages._is_local),
        patch.object(pages, "PAGE", max(page, pages.PAGE)),
    ):
        path = Path(folder) / "file"
        cuts = [min(max(0, cut * page + odd // 2), size) for cut in cuts]
        assert write_in_pieces(path, content, cuts, aligned, seed) == content


def test_pages_bypass_the_cache_where_they_can(tmp_path: Path) -> None:
    handle = direct_io.open_output(tmp_path / "file", 8 * pages.PAGE)
    try:
        if not handle.direct:
            pytest.skip("not a filesystem that is written past the cache")
        buffer = np.arange(8 * pages.PAGE, dtype=np.uint64).view(np.uint8)
        page, at = pages.PAGE, pages.place(buffer, 0, 100)

        def write(begin: int, end: int) -> None:
            piece = buffer[at + begin - 100 : at + end - 100]
            direct_io.write_at(handle, memoryview(piece), begin)  # type: ignore[arg-type]

        with watched_writes() as written:
            write(100, 3 * page + 100)
            assert written == [(handle.descriptor, page, [2 * page])]
            write(3 * page + 100, 5 * page)  # completes a page, which goes with the rest
            assert written[1:] == [(handle.descriptor, 3 * page, [page, page])]
            write(7 * page - 9, 7 * page)
            write(5 * page + 9, 7 * page - 9)
            write(5 * page, 5 * page + 9)
            assert written[2:] == [(handle.descriptor, 6 * page, [page]), (handle.descriptor, 5 * page, [page])]
            direct_io.sync_output(handle)
            [(through_cache, *rest)] = written[4:]
            assert through_cache != handle.descriptor
            assert rest == [100, [page - 100]]
        assert (tmp_path / "file").read_bytes() == bytes(100) + buffer[at : at + 7 * page - 100].tobytes() + bytes(page)
    finally:
        handle.close()


@contextlib.contextmanager
def watched_writes() -> Iterator[list[tuple[int, int, list[int]]]]:
    """Yields a list that grows by (descriptor, offset, lengths) with every write."""
    written: list[tuple[int, int, list[int]]] = []
    pwrite, pwritev = os.pwrite, os.pwritev

    def one(descriptor: int, content: memoryview, offset: int) -> int:
        written.append((descriptor, offset, [len(content)]))
        return pwrite(descriptor, content, offset)

    def several(descriptor: int, run: list[memoryview], offset: int) -> int:
        written.append((descriptor, offset, [len(content) for content in run]))
        return pwritev(descriptor, run, offset)

    with patch("os.pwrite", one), patch("os.pwritev", several):
        yield written


@pytest.mark.parametrize("fails", [False, True])
def test_a_sync_waits_for_shared_pages_that_another_thread_writes(tmp_path: Path, fails: bool) -> None:
    """And writes them itself if that thread fails: the piece that came first counts as written."""
    page = pages.PAGE
    handle = direct_io.open_output(tmp_path / "file", 2 * page)
    if not handle.direct:
        handle.close()
        pytest.skip("not a filesystem that is written past the cache")
    buffer = np.full(3 * page, 7, np.uint8)
    at = pages.place(buffer, 0, 0)
    started, go_on, errors = threading.Event(), threading.Event(), []
    pwritev = os.pwritev

    def slow(descriptor: int, run: list[memoryview], offset: int) -> int:
        started.set()
        assert go_on.wait(60)
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwritev(descriptor, run, offset)

    def complete() -> None:
        try:
            direct_io.write_at(handle, memoryview(buffer[at + 50 : at + page]), 50)  # type: ignore[arg-type]
        except OSError as error:
            errors.append(error.errno)

    with patch("os.pwritev", slow):
        direct_io.write_at(handle, memoryview(buffer[at : at + 50]), 0)  # type: ignore[arg-type]
        writer = threading.Thread(target=complete)
        writer.start()
        assert started.wait(60)
        syncer = threading.Thread(target=direct_io.sync_output, args=(handle,))
        syncer.start()
        syncer.join(0.05)
        assert syncer.is_alive()
        go_on.set()
        writer.join(60)
        syncer.join(60)
    handle.close()
    assert errors == [errno.EIO] * fails
    assert (tmp_path / "file").read_bytes() == b"\x07" * page + bytes(page)


def test_a_place_is_where_the_file_has_it() -> None:
    buffer = np.empty(5 * pages.PAGE, np.uint8)
    for at, offset in ((0, 0), (17, 0), (17, 4097), (pages.PAGE, 12345)):
        found = pages.place(buffer, at, offset)
        assert at <= found < at + pages.PAGE
        assert (buffer.ctypes.data + found - offset) % pages.PAGE == 0


# Python as on a machine with pages of another size. Counts what bypasses the cache, which must be whole pages.
OTHER_PAGES = """
import fcntl, os, sys
size, sysconf, pwritev, direct = int(sys.argv.pop(1)), os.sysconf, os.pwritev, 0
os.sysconf = lambda name: size if name == "SC_PAGE_SIZE" else sysconf(name)
import numpy
def watched(descriptor, run, offset):
    global direct
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    for content in run:
        address = numpy.frombuffer(content, numpy.uint8).ctypes.data
        assert address % size == offset % size == len(content) % size == 0, (address, offset, len(content))
    direct += 1
    return pwritev(descriptor, run, offset)
os.pwritev = watched
from mergekit_imm import merge_checkpoints
merge_checkpoints("base", "sft", sys.argv[1], drop=0.9, workers=3)
print(direct)
"""


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux")
@pytest.mark.parametrize("size", [16384, 65536])
def test_pages_of_other_sizes_give_the_same_bytes(tmp_path: Path, size: int) -> None:
    """As arm64 has them: what shares a page of the cache must not be written past it."""
    if size < pages.PAGE:
        pytest.skip("this system has larger pages")
    for i, role in enumerate(("base", "sft")):
        write_model(tmp_path / role, random_state(SHAPES, seed=i))
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "plain", drop=0.9, workers=1)
    ended = subprocess_of(size, "out", cwd=tmp_path, code=OTHER_PAGES)
    assert (ended.status, ended.err) == (0, "")
    same = files_of(tmp_path / "plain"), files_of(tmp_path / "out")
    assert same[0]["model.safetensors"] == same[1]["model.safetensors"]
    handle = direct_io.open_output(tmp_path / "file", 1)
    handle.close()
    assert handle.direct == (int(ended.out) > 0)


@pytest.mark.parametrize(
    ("mask", "memory", "offset", "direct"),
    [(0x2000, 4, 512, True), (0x2000, 512, 2 * pages.PAGE, False), (0x2000, 0, 0, False), (0, 0, 0, True)],
    ids=["smaller blocks", "larger blocks", "never direct", "not said"],
)
def test_a_filesystem_says_what_direct_writes_it_takes(
    tmp_path: Path, mask: int, memory: int, offset: int, direct: bool
) -> None:
    handle = direct_io.open_output(tmp_path / "before", 1)
    handle.close()
    if not handle.direct:
        pytest.skip("not a filesystem that is written past the cache")

    def statx(_folder: int, _path: bytes, _flags: int, _mask: int, found: Any) -> int:
        found.raw = struct.pack("I148xII", mask, memory, offset).ljust(256, b"\0")
        return 0

    with patch.object(pages.libc, "statx", statx, create=True):
        handle = direct_io.open_output(tmp_path / "file", 1)
    handle.close()
    assert handle.direct == direct


# --- forced to the disk


FULL = 51  # F_FULLFSYNC of macOS


@contextlib.contextmanager
def full_syncs(number: int = 0) -> Iterator[dict[str, set[str]]]:
    """A system that has F_FULLFSYNC, which fails with an error number if one is given; yields what was synced how."""
    found: dict[str, set[str]] = {"full": set(), "plain": set()}
    fcntl_, fsync, fdatasync = fcntl.fcntl, os.fsync, os.fdatasync

    def name(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name.removesuffix(".new")

    def full(descriptor: int, command: int, *rest: Any) -> Any:
        if command != FULL:
            return fcntl_(descriptor, command, *rest)
        if number:
            raise OSError(number, os.strerror(number))
        return found["full"].add(name(descriptor))

    def plain(sync: Callable[[int], None]) -> Callable[[int], None]:
        def watched(descriptor: int) -> None:
            found["plain"].add(name(descriptor))
            sync(descriptor)

        return watched

    with (
        patch.object(fcntl, "F_FULLFSYNC", FULL, create=True),
        patch.object(fcntl, "fcntl", full),
        patch.object(os, "fsync", plain(fsync)),
        patch.object(os, "fdatasync", plain(fdatasync)),
    ):
        yield found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux")
def test_the_cache_of_the_drive_is_emptied_where_the_system_offers_it(tmp_path: Path) -> None:
    """On macOS fsync leaves bytes in the drive's cache, which a power cut loses."""
    base, sft = (write_model(tmp_path / f"in{i}", random_state(SHAPES, seed=i)) for i in range(2))
    everything = {"out.partial", ".imm_journal", "model.safetensors", "imm_recipe.json", "imm_report.json", "README.md"}
    with full_syncs() as synced:
        merge_checkpoints(base, sft, tmp_path / "out")
    assert synced["full"] >= everything | {tmp_path.name}
    assert not synced["plain"]
    with full_syncs(errno.ENOTSUP) as synced:
        merge_checkpoints(base, sft, tmp_path / "out", alpha=0.25, overwrite=True)
    assert synced["plain"] >= everything
    with full_syncs(errno.EIO), pytest.raises(OutputError, match="cannot be written: Input/output error; check the d"):
        merge_checkpoints(base, sft, tmp_path / "out", alpha=0.75, overwrite=True)


# --- what systems do to reads and writes


@contextlib.contextmanager
def short_writes() -> Iterator[None]:
    pwrite, pwritev = os.pwrite, os.pwritev

    def third(content: memoryview) -> memoryview:
        return content[: max(1, len(content) // 3)]

    with (
        patch("os.pwrite", lambda fd, content, at: pwrite(fd, third(memoryview(content)), at)),
        patch("os.pwritev", lambda fd, run, at: pwritev(fd, [*run[:-1], third(run[-1])], at)),
    ):
        yield


@contextlib.contextmanager
def short_reads() -> Iterator[None]:
    preadv = os.preadv
    with patch("os.preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], at)):
        yield


@contextlib.contextmanager
def no_fallocate() -> Iterator[None]:
    with (
        patch.object(pages.libc, "fallocate", lambda *_: -1, create=True),
        patch("ctypes.get_errno", lambda: errno.EOPNOTSUPP),
    ):
        yield


@contextlib.contextmanager
def no_direct_files() -> Iterator[None]:
    opened = os.open

    def refused(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **named)

    with patch("os.open", refused):
        yield


@contextlib.contextmanager
def no_direct_writes() -> Iterator[None]:
    with patch("os.pwritev", side_effect=OSError(errno.EINVAL, "Invalid argument")):
        yield


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """A signal every half millisecond: system calls end with EINTR, and are called again."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    before = signal.signal(signal.SIGALRM, counted)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux")
@pytest.mark.parametrize(
    "injected",
    [short_writes, short_reads, no_fallocate, no_direct_files, no_direct_writes, signals],
    ids=lambda each: each.__name__,
)
def test_a_merge_gives_the_same_bytes_whatever_the_system_does(
    place_of: Path, tmp_path: Path, injected: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    base, sft = (write_model(tmp_path / f"in{i}", random_state(SHAPES, seed=i)) for i in range(2))
    merge_checkpoints(base, sft, tmp_path / "plain", drop=0.9, workers=1)
    with injected():
        merge_checkpoints(base, sft, place_of / "out", drop=0.9, workers=3)
    assert files_of(place_of / "out") == files_of(tmp_path / "plain")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kind", ["ramfs", "tmpfs"])
def test_filesystems_in_memory(tmp_path: Path, kind: str) -> None:
    base, sft = (write_model(tmp_path / f"in{i}", random_state(SHAPES, seed=i)) for i in range(2))
    merge_checkpoints(base, sft, tmp_path / "plain", drop=0.9)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", kind, "none", str(mounted)], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"{kind} cannot be mounted here")
    try:
        assert merge_checkpoints(base, sft, mounted / "out", drop=0.9).status == "merged"
        assert files_of(mounted / "out") == files_of(tmp_path / "plain")
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_file_that_cannot_be_opened_leaves_no_descriptor(tmp_path: Path) -> None:
    next_free = os.dup(0)
    os.close(next_free)
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(direct_io, "allocate", side_effect=full), pytest.raises(OSError, match="No space left"):
        direct_io.open_output(tmp_path / "file", 10)
    again = os.dup(0)
    os.close(again)
    assert again == next_free
