"""What holds for all tests: none fails because a machine is slow, and none leaves anything behind."""

from __future__ import annotations

import os
import shutil
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
    if "not thorough" in config.option.markexpr:
        thorough.FEWER = 4


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
