"""Record what a process does to files, call by call, with ptrace(2), or kill it at the n-th call.

A call counts if it changes or syncs something below a folder. Each runs alone from entry to exit, so that the calls of
several threads are ordered. Linux on x86-64 and ARM only; needs no privileges, as the process is a child.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _CLONE, _EXITKILL = 1, 8, 1 << 20
_WALL = 0x40000000
_AT_FDCWD, _O_CREAT, _O_TRUNC, _EXCHANGE = -100, 0o100, 0o1000, 2

_NUMBERS = {
    "x86_64": {
        1: "write", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate",
        82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link", 87: "unlink", 88: "symlink", 265: "linkat",
        266: "symlinkat", 328: "pwritev2", 437: "openat2", 257: "openat",
        2: "open", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 285: "fallocate", 296: "pwritev", 316: "renameat2",
        326: "copy_file_range", 40: "sendfile",
    },
    "aarch64": {
        64: "write", 68: "pwrite64", 66: "writev", 82: "fsync", 83: "fdatasync", 45: "truncate", 46: "ftruncate",
        34: "mkdirat", 35: "unlinkat", 36: "symlinkat", 37: "linkat", 287: "pwritev2",
        437: "openat2", 38: "renameat", 56: "openat", 47: "fallocate", 70: "pwritev", 276: "renameat2",
        285: "copy_file_range", 71: "sendfile",
    },
}  # fmt: skip
CALLS = _NUMBERS.get(os.uname().machine, {}) if sys.platform == "linux" else {}


@dataclass(frozen=True)
class Call:
    """One call that took effect. Files and folders are known by their inodes."""

    kind: str  # create, mkdir, write, size, rename, exchange, remove, sync, nothing
    node: int = 0  # written, synced or created
    folder: int = 0
    name: str = ""
    to_folder: int = 0
    to_name: str = ""
    offset: int = 0
    data: bytes = b""

    def __str__(self) -> str:
        place = self.name + (f" to {self.to_name}" if self.to_name else "")
        return f"{self.kind} {place or self.node}" + (f" {self.offset}+{len(self.data)}" if self.data else "")


class _Process:
    """A traced child process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)

    def close(self) -> None:
        os.close(self.memory)

    def bytes_at(self, address: int, count: int) -> bytes:
        content = b""
        while len(content) < count:
            piece = os.pread(self.memory, count - len(content), address + len(content))
            assert piece
            content += piece
        return content

    def run_at(self, address: int, count: int) -> list[tuple[int, int]]:
        """Return address and length of each buffer of an array of struct iovec."""
        return list(struct.iter_unpack("QQ", self.bytes_at(address, 16 * count)))

    def path_at(self, address: int, folder: int) -> Path:
        content = b""
        while b"\0" not in content:
            content += os.pread(self.memory, 256 - (address + len(content)) % 256, address + len(content))
        path = os.fsdecode(content.split(b"\0")[0])
        here = "cwd" if folder == _AT_FDCWD else f"fd/{folder}"
        return Path(os.readlink(f"/proc/{self.pid}/{here}"), path)  # noqa: PTH115 - a Path has no place for it

    def path_of(self, descriptor: int) -> Path:
        return Path(os.readlink(f"/proc/{self.pid}/fd/{descriptor}"))  # noqa: PTH115

    def inode_of(self, descriptor: int) -> int:
        return Path(f"/proc/{self.pid}/fd/{descriptor}").stat().st_ino


def _signed(value: int) -> int:
    return ctypes.c_int(value & 0xFFFFFFFF).value


def _about(process: _Process, name: str, args: tuple[int, ...], root: Path) -> Callable[[int], list[Call]] | None:
    """Return what a call will do below `root`, as a function of its result; None for nothing."""

    def below(path: Path) -> bool:
        return path == root or root in path.parents

    def inode(path: Path) -> int:
        return path.stat().st_ino

    if name in ("write", "pwrite64", "pwritev", "pwritev2", "fsync", "fdatasync", "ftruncate", "fallocate"):
        descriptor = _signed(args[0])
        try:
            path = process.path_of(descriptor)
        except FileNotFoundError:
            return None
        if not below(path):
            return None
        node = process.inode_of(descriptor)
        if name in ("fsync", "fdatasync"):
            return lambda _: [Call("sync", node, name=path.name)]
        if name == "ftruncate":
            return lambda _: [Call("size", node, name=path.name, offset=args[1])]
        if name == "fallocate":
            assert args[1] == 0, "only plain preallocation is modelled"
            size = max(args[2] + args[3], path.stat().st_size)
            return lambda _: [Call("size", node, name=path.name, offset=size)]
        pieces = process.run_at(args[1], args[2]) if name.startswith("pwritev") else [(args[1], args[2])]
        content = b"".join(process.bytes_at(*piece) for piece in pieces)
        at = int(Path(f"/proc/{process.pid}/fdinfo/{descriptor}").read_text().split()[1])
        offset = at if name == "write" else args[3]
        return lambda done: [Call("write", node, name=path.name, offset=offset, data=content[:done])]
    if name in ("openat", "open", "creat"):
        path = process.path_at(*((args[1], _signed(args[0])) if name == "openat" else (args[0], _AT_FDCWD)))
        flags = {"openat": args[2], "open": args[1], "creat": _O_CREAT | _O_TRUNC}[name]
        if not below(path) or not flags & (_O_CREAT | _O_TRUNC):
            return None
        if path.exists():
            return (lambda _: [Call("size", inode(path), name=path.name)]) if flags & _O_TRUNC else None
        return lambda _: [Call("create", inode(path), inode(path.parent), path.name)]
    if name in ("mkdir", "mkdirat"):
        path = process.path_at(*((args[0], _AT_FDCWD) if name == "mkdir" else (args[1], _signed(args[0]))))
        return (lambda _: [Call("mkdir", inode(path), inode(path.parent), path.name)]) if below(path) else None
    if name in ("unlink", "rmdir", "unlinkat"):
        path = process.path_at(*((args[1], _signed(args[0])) if name == "unlinkat" else (args[0], _AT_FDCWD)))
        folder = inode(path.parent) if below(path) else 0
        return (lambda _: [Call("remove", 0, folder, path.name)]) if below(path) else None
    if name in ("rename", "renameat", "renameat2"):
        one, other = (
            (process.path_at(args[0], _AT_FDCWD), process.path_at(args[1], _AT_FDCWD))
            if name == "rename"
            else (process.path_at(args[1], _signed(args[0])), process.path_at(args[3], _signed(args[2])))
        )
        kind = "exchange" if name == "renameat2" and args[4] & _EXCHANGE else "rename"
        if not below(one):
            return None
        return lambda _: [Call(kind, 0, inode(one.parent), one.name, inode(other.parent), other.name)]
    of_paths = name in ("link", "symlink", "linkat", "symlinkat", "openat2", "truncate")
    if of_paths or below(process.path_of(_signed(args[0]))):
        raise AssertionError(f"the program calls {name}, which is not modelled")
    return None


def traced(work: Callable[[], None], root: Path, stop_at: int | None = None) -> tuple[int | None, list[Call]]:
    """Fork, do some work in the child, and return its exit status and its calls.

    With `stop_at` it is killed before its call of that number, from 0; the status is None if it was.
    """
    status: int | None = 70
    pid = os.fork()
    if pid == 0:
        try:
            _libc.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        finally:
            os._exit(status or 0)
    os.waitpid(pid, 0)
    _check(_libc.ptrace(_SETOPTIONS, pid, None, _SYSGOOD | _CLONE | _EXITKILL))
    process = _Process(pid)
    try:
        status, calls = _follow(process, root, stop_at)
    finally:
        process.close()
    return status, _with_unique_nodes(calls)


def _with_unique_nodes(calls: list[Call]) -> list[Call]:
    """Renumber created files and folders: inodes may be reused."""
    names: dict[int, int] = {}
    found = []
    for count, call in enumerate(calls, 1):
        if call.kind in ("create", "mkdir"):
            names[call.node] = -count
        node, folder, to = (names.get(each, each) for each in (call.node, call.folder, call.to_folder))
        found.append(replace(call, node=node, folder=folder, to_folder=to))
    return found


def _follow(process: _Process, root: Path, stop_at: int | None) -> tuple[int | None, list[Call]]:
    calls: list[Call] = []
    seen, killed = 0, False
    _resume(process.pid, 0)
    known = {process.pid}
    while True:
        thread, status = os.waitpid(-1, _WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread == process.pid:
                return (None if killed else os.waitstatus_to_exitcode(status)), calls
            continue
        number = os.WSTOPSIG(status)
        if number != signal.SIGTRAP | 0x80:
            first = thread not in known
            known.add(thread)
            _resume(thread, 0 if number == signal.SIGTRAP or (first and number == signal.SIGSTOP) else number)
            continue
        if killed:
            _resume(thread, 0)
            continue
        op, call, args, _ = _info(thread)
        name = CALLS.get(call) if op == 1 else None
        effect = _about(process, name, args, root) if name else None
        if effect is not None and seen == stop_at:
            killed = True
            os.kill(process.pid, signal.SIGKILL)
            continue
        seen += effect is not None
        if op == 1 and effect is not None:
            _resume(thread, 0)
            os.waitpid(thread, _WALL)  # no other thread continues until this call is through
            result = _info(thread)[3]
            calls += effect(result) if result >= 0 else [Call("nothing", name=f"{name}, which failed")]
        _resume(thread, 0)


def _info(thread: int) -> tuple[int, int, tuple[int, ...], int]:
    """Return op (1 entry, 2 exit), number and arguments of a call, and its result."""
    buffer = ctypes.create_string_buffer(88)
    _check(_libc.ptrace(_GET_SYSCALL_INFO, thread, 88, buffer))
    entry = struct.unpack_from("<7Q", buffer.raw, 24)
    return buffer.raw[0], entry[0], entry[1:], struct.unpack_from("<q", buffer.raw, 24)[0]


def _resume(thread: int, number: int) -> None:
    _libc.ptrace(_SYSCALL, thread, None, number)  # the thread may just have been killed: no error


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
