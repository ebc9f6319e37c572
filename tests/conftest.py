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


def pytest_configure(config: pytest.Config) -> None:
    """Draw fewer examples where thorough tests are left out."""
    if "not thorough" in config.option.markexpr:
        thorough.FEWER = 4


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the processes they start, find an empty temporary folder, and must leave it empty."""
    ours = tmp_path_factory.getbasetemp()
    temporary = tmp_path_factory.mktemp("temporary", numbered=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(temporary))
        patched.setattr(tempfile, "tempdir", None)
        yield
    left = sorted(path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_"))
    mounted = [line.split()[1] for line in _mounts() if line.split()[1].startswith(f"{ours}/")]
    for path in ours.iterdir():
        if path.is_symlink():
            path.unlink()
        elif not path.name.startswith("test_"):  # the folders of fixtures; those of tests that failed are kept
            shutil.rmtree(path)
    assert not left, f"left in the temporary folder: {left}"
    assert not mounted, f"left mounted: {mounted}"


def _mounts() -> list[str]:
    try:
        return Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return []


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove pytest's own folders too, where they are empty."""
    base = config._tmp_path_factory._basetemp  # type: ignore[attr-defined]
    if base is not None and config.option.basetemp is None:
        for folder in (base, base.parent):
            with suppress(OSError):
                os.rmdir(folder)  # noqa: PTH106
