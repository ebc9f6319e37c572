"""Where a merge writes: the names beside OUT, the outputs that are refused, the lock of a folder.

OUT is built as OUT.partial (see `journal`) and renamed when it is complete (see `publish`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common.checks import as_path
from ..common.messages import shown
from ..common.threads import when_unused
from ..errors import OutputError
from ..options.recipe import RECIPE_FILE
from .write_errors import output_errors


def expanded(out: str | Path) -> Path:
    """Return an output's path with ~ expanded. Raises OutputError if there is no such home."""
    try:
        return Path(as_path("out", out, "a folder to make")).expanduser()
    except RuntimeError as error:
        raise OutputError(f"output {shown(out)} has no home folder: {error}; give a whole path") from error


def partial_of(out: Path) -> Path:
    """Return OUT.partial, the folder that `out` is built in."""
    return out.with_name(out.name + ".partial")


def marker_of(out: Path) -> Path:
    """Return OUT.replacing, the file that exists while `out` is exchanged."""
    return out.with_name(out.name + ".replacing")


def old_of(out: Path) -> Path:
    """Return OUT.old, where the folder that `out` replaces may be meanwhile."""
    return out.with_name(out.name + ".old")


def check_name(out: Path) -> None:
    """Raise OutputError for an output that cannot be made or exchanged, whatever the inputs."""
    with output_errors(out):
        if out.name in ("", ".", ".."):
            raise OutputError(f"output {shown(out)} has no name of its own; give a folder that can be created")
        if out.suffix in (".partial", ".replacing"):
            raise OutputError(f"output {shown(out)} ends like the name of a merge under way; choose another name")
        partial = partial_of(out)
        for path in (out, partial, marker_of(out)):
            with suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()  # fails for a name that is too long, and in a folder that we may not enter
        if ".." in out.parts and not out.parent.exists():
            raise OutputError(f"output {shown(out)} leads through a folder that does not exist; write it without '..'")
        if out.is_symlink():
            raise OutputError(f"output {shown(out)} is a link; give the folder it points to")
        if out.exists() and not out.is_dir():
            raise OutputError(f"output {shown(out)} is a file; an output is a folder")
        if out.is_dir() and out.is_mount():
            raise OutputError(f"output {shown(out)} is a mount point, which cannot be renamed; give a folder inside it")
        if partial.is_dir() and partial.is_mount():
            raise OutputError(f"{shown(partial)}, where the output is built, is a mount point; choose another OUT")
        if partial.is_symlink():
            raise OutputError(f"{shown(partial)}, where the output is built, is a link; remove it")
        if partial.exists() and not partial.is_dir():
            raise OutputError(f"{shown(partial)}, where the output is built, is a file; remove it")
        file = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
        if file is not None:
            raise OutputError(
                f"output {shown(out)} lies below a file: {shown(file)}: Not a directory; give another output"
            )


def check_place(out: Path, inputs: Mapping[str, Path]) -> None:
    """Raise OutputError for an output that would touch an input. `inputs`: label -> file or folder."""
    with output_errors(out):
        for label, path in inputs.items():
            place = path.resolve()
            for ours in (out, partial_of(out)):
                if not ours.exists() or not any(ours.samefile(each) for each in (place, *place.parents)):
                    continue
                what = "an input" if ours.samefile(place) else "a folder around an input"
                raise OutputError(
                    f"output {shown(ours)} would replace {what} ({label} {shown(path)}); give another output"
                )


def is_whole(out: Path, recipe: bytes, sizes: Mapping[str, int | None]) -> bool:
    """Return whether `out` already holds this merge: its recipe and every file, of this size unless it is None."""
    try:
        path = out / RECIPE_FILE
        return (
            path.is_file()
            and path.read_bytes() == recipe
            and all((out / name).stat().st_size == size or size is None for name, size in sizes.items())
        )
    except OSError:
        return False


def is_occupied(out: Path) -> bool:
    """Return whether `out` is a folder that is not empty."""
    return out.is_dir() and any(out.iterdir())


_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(
    path: Path, by: str = "is being written by another merge; wait for it, or give another output"
) -> Iterator[int | None]:
    """Lock a folder or a file for this process and those that inherit the descriptor that it yields.

    Yields None where the filesystem has no such locks: NFS has none for folders, Lustre often none at all. Raises
    OutputError, with `by` as its reason, if another process holds it.
    """
    busy = OutputError(f"{shown(path)} {by}")
    try:
        # NFS locks a file only if it is open for writing.
        descriptor = os.open(path, (os.O_RDWR if path.is_file() else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError:
        raise busy from None
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held = False
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise busy  # the other merge has just finished, and moved it
        yield descriptor if held else None
    finally:
        when_unused(lambda: os.close(descriptor))
