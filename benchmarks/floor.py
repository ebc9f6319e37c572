"""The I/O floor of a merge: the same reads and as many written bytes, with no arithmetic.

    python benchmarks/floor.py BASE SFT [START] OUT [--workers 2] [--direct]

Threads take pieces of 2 MiB in the order of the files, read that piece of every input, and write one buffer of as many
bytes to a preallocated file. The time ends when every file is on the disk (fdatasync). With --direct the writes go
past the page cache (O_DIRECT). Prints JSON: seconds, bytes_read, bytes_written.
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
ALIGNED = 4096  # what O_DIRECT asks of addresses, offsets and lengths


def sizes_of(sources: list[Path]) -> dict[str, int]:
    """Names and sizes of the safetensors files, which all sources must share."""
    found = [{file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))} for path in sources]
    if not found[0] or any(each != found[0] for each in found):
        raise SystemExit("error: the inputs must hold the same safetensors files, of the same sizes")
    return found[0]


def copy(sources: list[Path], out: Path, *, workers: int, direct: bool) -> dict[str, float]:
    """Read all sources and write as many bytes as one of them has; return seconds and bytes."""
    sizes = sizes_of(sources)
    out.mkdir()
    began = time.perf_counter()
    inputs = {name: [os.open(source / name, os.O_RDONLY) for source in sources] for name in sizes}
    outputs: dict[str, int] = {}
    pieces: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for name, size in sizes.items():
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0)
        outputs[name] = os.open(out / name, flags, 0o666)
        os.posix_fallocate(outputs[name], 0, size + -size % ALIGNED if direct else size)
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
                    read += _whole(os.preadv, descriptor, buffer[:count], at)
                rounded = count + -count % ALIGNED if direct else count
                written += _whole(os.pwritev, outputs[name], buffers[0][:rounded], at) - (rounded - count)
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
        if direct:
            os.ftruncate(descriptor, sizes[name])
        os.fdatasync(descriptor)
    seconds = time.perf_counter() - began
    for descriptor in [*outputs.values(), *(each for group in inputs.values() for each in group)]:
        os.close(descriptor)
    return {
        "seconds": round(seconds, 6),
        "bytes_read": sum(read for read, _ in counts),
        "bytes_written": sum(written for _, written in counts),
    }


def _whole(call, descriptor: int, buffer: memoryview, at: int) -> int:  # type: ignore[no-untyped-def]
    """Read or write all of a buffer."""
    done = 0
    while done < len(buffer):
        moved = call(descriptor, [buffer[done:]], at + done)
        if not moved:
            raise OSError("unexpected end of file")
        done += moved
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--direct", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(copy(arguments.sources, arguments.out, workers=arguments.workers, direct=arguments.direct)))
