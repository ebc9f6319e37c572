"""Why an output cannot be written, in one line with a cure: errors of the system, and too little space."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..common.messages import bytes_text, shown
from ..errors import OutputError

_CURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "raise the quota",
    errno.EIO: "check the disk (the system's log says more)",
    errno.EACCES: "choose another OUT or change its permissions",
    errno.EPERM: "choose another OUT or change its permissions",
    errno.EROFS: "choose another OUT",
    errno.ENAMETOOLONG: "choose a shorter OUT; it is built as OUT.partial",
    errno.EBUSY: "something is mounted there: choose another OUT",
    errno.EFBIG: "the filesystem allows no file that large: use a smaller --max-shard-size, or choose another OUT",
    errno.EMFILE: "allow more open files (ulimit -n), or give fewer values at a time",
    errno.ENFILE: "the whole system has too many files open: close some",
}


@contextmanager
def output_errors(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn an OSError into an OutputError of one line, which names `partial` if the merge can be resumed."""
    try:
        yield
    except OSError as error:
        cure = f"; {_CURES[error.errno]}" if error.errno in _CURES else ""
        if partial is not None and partial.is_dir() and any(partial.iterdir()):
            cure += f"; what was written is kept in {shown(partial)}; run the same command again to resume"
        place = shown(os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path, 300)
        raise OutputError(f"{place} cannot be written: {error.strerror or error}{cure}") from error


def disk_of(out: Path) -> tuple[int, int]:
    """Return the number of the device where `out` will be written, and its free bytes.

    sys.maxsize stands for a filesystem that does not say.
    """
    parent = next((p for p in (out.parent, *out.parent.parents) if p.exists()), Path("/"))
    usage = shutil.disk_usage(parent)
    return parent.stat().st_dev, usage.free if usage.total else sys.maxsize  # ramfs


def lack_of_space(needed: Mapping[Path, int]) -> str:
    """Describe the outputs that do not fit on their disk, given the bytes that each needs; "" if all fit."""
    of_disk: dict[int, int] = {}
    for out, nbytes in needed.items():
        disk, free = disk_of(out)
        of_disk[disk] = of_disk.get(disk, 0) + nbytes
        if of_disk[disk] > free:
            need = f"output {shown(out)} needs" if len(needed) == 1 else f"outputs up to {shown(out)} need"
            return (
                f"{need} {bytes_text(of_disk[disk])} and the disk has {bytes_text(free)} free; free some space or give"
                " an OUT on another disk"
            )
    return ""
