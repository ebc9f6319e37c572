"""The I/O floor of a merge: the same reads and as many written bytes, with no arithmetic.

    python benchmarks/floor.py BASE SFT [START] OUT [--workers 4] [--reads hint] [--writes direct]

Threads take pieces of 2 MiB in the order of the files, read that piece of every input, and write one buffer of as many
bytes to a preallocated file. The time ends when every file is on the disk (fdatasync).

Reads go through the page cache, announced eight pieces ahead (hint), or past it (direct: O_DIRECT). Writes go past it
(direct), through it and out of it again (dontcache: RWF_DONTCACHE, Linux 6.14), or stay in it (cached). Prints JSON:
seconds, cpu_seconds, bytes_read, bytes_written.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import queue
import threading
import time
from pathlib import Path

PIECE = 2 << 20
AHEAD = 8  # pieces
ALIGNED = 4096  # what O_DIRECT asks of addresses, offsets and lengths
DONTCACHE = 0x80
READS, WRITES = ("hint", "direct"), ("direct", "dontcache", "cached")


def sizes_of(sources: list[Path]) -> dict[str, int]:
    """Names and sizes of the safetensors files, which all sources must share."""
    found = [{file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))} for path in sources]
    if not found[0] or any(each != found[0] for each in found):
        raise SystemExit("error: the inputs must hold the same safetensors files, of the same sizes")
    return found[0]


def copy(sources: list[Path], out: Path, *, workers: int, reads: str, writes: str) -> dict[str, float]:
    """Read all sources and write as many bytes as one of them has; return seconds and bytes."""
    sizes = sizes_of(sources)
    out.mkdir()
    began, cpu = time.perf_counter(), time.process_time()
    to_read = os.O_RDONLY | (os.O_DIRECT if reads == "direct" else 0)
    to_write = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if writes == "direct" else 0)
    inputs = {name: [os.open(source / name, to_read) for source in sources] for name in sizes}
    outputs: dict[str, int] = {}
    pieces: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for name, size in sizes.items():
        outputs[name] = os.open(out / name, to_write, 0o666)
        os.posix_fallocate(outputs[name], 0, size + -size % ALIGNED)
        for at in range(0, size, PIECE):
            pieces.put((name, at))
    counts: list[tuple[int, int]] = []
    failures: list[BaseException] = []

    def work() -> None:
        buffers = [memoryview(mmap.mmap(-1, PIECE)) for _ in sources]  # page-aligned
        read = written = 0
        try:
            while True:
                try:
                    name, at = pieces.get_nowait()
                except queue.Empty:
                    break
                count = min(PIECE, sizes[name] - at)
                for descriptor, buffer in zip(inputs[name], buffers, strict=True):
                    if reads == "hint":
                        os.posix_fadvise(descriptor, at + AHEAD * PIECE, PIECE, os.POSIX_FADV_WILLNEED)
                    read += _read(descriptor, buffer, at, count)
                whole = count + -count % ALIGNED if writes == "direct" else count
                written += _write(outputs[name], buffers[0][:whole], at, DONTCACHE if writes == "dontcache" else 0)
                written -= whole - count
            counts.append((read, written))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    for name, descriptor in outputs.items():
        os.ftruncate(descriptor, sizes[name])
        os.fdatasync(descriptor)
    took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    for descriptor in [*outputs.values(), *(each for group in inputs.values() for each in group)]:
        os.close(descriptor)
    return {
        **{name: round(value, 6) for name, value in took.items()},
        "bytes_read": sum(read for read, _ in counts),
        "bytes_written": sum(written for _, written in counts),
    }


def _read(descriptor: int, buffer: memoryview, at: int, count: int) -> int:
    """Read `count` bytes into a buffer of whole pages."""
    done = 0
    while done < count:
        moved = os.preadv(descriptor, [buffer[done : count + -count % ALIGNED]], at + done)
        if not moved:
            raise OSError("unexpected end of file")
        done += moved
    return count


def _write(descriptor: int, buffer: memoryview, at: int, flags: int) -> int:
    """Write all of a buffer."""
    done = 0
    while done < len(buffer):
        done += os.pwritev(descriptor, [buffer[done:]], at + done, flags)
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--reads", choices=READS, default="hint")
    parser.add_argument("--writes", choices=WRITES, default="direct")
    a = parser.parse_args()
    print(json.dumps(copy(a.sources, a.out, workers=a.workers, reads=a.reads, writes=a.writes)))
