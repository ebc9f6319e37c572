"""Measure a command in a process of its own, and say on what machine. Small itself: see `measured`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = 4096


class FailedError(Exception):
    """A command did not exit with 0; the message is the last line that it printed."""


def measured(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, out: Path | None = None
) -> tuple[dict[str, float], str]:
    """Run a command; return what it took, and what it printed.

    wall: seconds from start to exit; to_disk: until the files of `out` are on the disk as well (the same for a command
    that forces them there itself); cpu: seconds of all its threads; peak: largest resident bytes as the system counts
    them, mapped files included; anonymous: the same without mapped files, sampled every 50 ms.

    A child starts with the peak memory of the process it was forked from: whoever calls this must stay small.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        ended = threading.Event()
        samples = [0]
        sampler = threading.Thread(target=_sample, args=(process.pid, ended, samples))
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
        wall = time.perf_counter() - began
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = (output.read() + errors.read()).strip().splitlines()
            raise FailedError(f"exit status {process.returncode}: {lines[-1] if lines else 'nothing printed'}")
        if out is not None:
            for file in sorted(out.rglob("*.safetensors")):
                _force(file)
        kilobyte = 1024 if sys.platform == "linux" else 1
        took = {
            "wall": wall,
            "to_disk": time.perf_counter() - began if out is not None else wall,
            "cpu": usage.ru_utime + usage.ru_stime,
            "peak": usage.ru_maxrss * kilobyte,
            "anonymous": samples[0],
        }
        return took, output.read()


def _sample(pid: int, ended: threading.Event, largest: list[int]) -> None:
    """Keep the largest anonymous resident memory of a process in largest[0]."""
    while not ended.wait(0.05):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        if found:
            largest[0] = max(largest[0], int(found[1]) * 1024)


def _force(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def warm(files: Sequence[Path]) -> None:
    """Read files once, so that they are in the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(1 << 20)
            while file.readinto(buffer):
                pass


def evict(files: Sequence[Path]) -> None:
    """Take files out of the page cache; they must be on the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def memory() -> dict[str, int]:
    """Bytes of memory, as /proc/meminfo has them: MemTotal, MemAvailable and so on."""
    text = Path("/proc/meminfo").read_text()
    return {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", text)}


def cpu_name() -> str:
    """What the processor calls itself, without trademark signs."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.machine()
    return " ".join(re.sub(r"\((R|TM|tm)\)|@.*", "", name).split())


def machine(folder: Path) -> dict[str, Any]:
    """The hardware and system, and the filesystem of a folder. No names of hosts or places."""
    flags = Path("/proc/cpuinfo").read_text()
    vectors = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "vector": next((name for flag, name in vectors.items() if flag in flags), "unknown"),
        "memory_gb": round(memory()["MemTotal"] / 1e9, 1),
        "kernel": re.sub(r"-.*", "", platform.release()),
        "filesystem": max(above, default=(0, "unknown"))[1],
        "disk_free_gb": round(shutil.disk_usage(folder).free / 1e9),
    }


def versions(python: str | Path, names: Sequence[str]) -> dict[str, str]:
    """Versions of packages in the environment of a Python; those that are not there are left out."""
    code = (
        "import sys, importlib.metadata as m\n"
        "for n in sys.argv[1:]:\n"
        "    try: print(n, m.version(n))\n"
        "    except m.PackageNotFoundError: pass"
    )
    shown = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in shown.splitlines())


def git_version(folder: Path) -> str:
    """The commit that the source beside this folder is at, with "+" if it was changed; "unknown" outside a checkout."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "../src", ".", ":!results", ":!results.json").returncode == 1
    return commit + "+" * changed if commit else "unknown"
