"""What holds for all tests: none fails because a machine is slow, and none leaves anything behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import thorough

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def base_of(config: pytest.Config) -> Path:
    return Path(config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give tests and their processes an empty temporary folder; without thorough tests, draw fewer examples."""
    temporary = base_of(config) / "temporary"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; more threads would wait for each other
    if "not thorough" in config.option.markexpr:
        thorough.FEWER = 4
    if not hasattr(config, "workerinput"):
        _compile_loops()


def _compile_loops() -> None:
    """Compile the usual loops, as commands and as Python callers do, so that no test sees the note that says so."""
    programs = [
        subprocess.Popen([sys.executable, "-c", _LOOPS], env=os.environ | {"MERGEKIT_IMM_WIDE_VECTORS": wide})
        for wide in ("0", "1")
    ]
    assert [program.wait() for program in programs] == [0, 0]


_LOOPS = """
import numpy as np
from mergekit_imm.numerics.cpu import merge_span
from mergekit_imm.numerics.mask import arithmetic
from mergekit_imm.numerics.statistics import new_tally
for dtype, width in (("F32", 4), ("BF16", 2)):
    base, start, sft, out = ((np.zeros(1024 * width, np.uint8), dtype) for _ in range(4))
    for begin in (base, start):
        for drop in (0.5, 0):
            merge_span(base, begin, sft, out, 1024, 0, (0, 0), arithmetic(alpha=0.5, drop=drop), new_tally())
from mergekit_imm.analysis.audit_sums import measure
zeros = np.zeros(8, np.float32)
measure(zeros, zeros, zeros, 1.0, 1.0, "BF16")
"""


_HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    """A command that ends ignores signals; in this process, later tests and their processes would ignore them too."""
    yield
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left(pytestconfig: pytest.Config) -> Iterator[None]:
    """Remove the folders of fixtures at the end, not those of tests that failed, and see that nothing else is there."""
    yield
    ours = base_of(pytestconfig)
    left = [path.name for path in (ours / "temporary").iterdir() if not path.name.startswith("torchinductor_")]
    mounted = [line.split()[1] for line in _mounts() if line.split()[1].startswith(f"{ours}/")]
    for path in ours.iterdir():
        if path.is_symlink():
            path.unlink()
        elif path.is_dir() and not path.name.startswith(("test_", "temporary")):  # a file here is pytest's own
            shutil.rmtree(path)
    assert not left, f"left in the temporary folder: {sorted(left)}"
    assert not mounted, f"left mounted: {mounted}"


def _mounts() -> list[str]:
    try:
        return Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return []


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the temporary folder, and pytest's own ones where they are empty."""
    base = base_of(config)
    shutil.rmtree(base / "temporary", ignore_errors=True)
    for folder in (base, base.parent) if config.option.basetemp is None else ():
        with suppress(OSError):
            os.rmdir(folder)  # noqa: PTH106
