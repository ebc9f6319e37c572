"""A rank's place, and how ranks connect."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from mergekit_imm import merge_checkpoints
from mergekit_imm.errors import ArgumentError, RankError
from mergekit_imm.ranks import torchrun
from merging_ranks import free_port


def test_variables_alone_mean_nothing(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is not torchrun's child, whatever its environment says."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "4")
    assert not torchrun.is_started_by_torchrun()
    with torchrun.connected(None) as ranks:
        assert ranks is None
    assert merge_checkpoints("base", "sft", "out").status == "merged"


def test_a_single_rank_needs_no_torch() -> None:
    code = (
        "import os, sys; from mergekit_imm.ranks.torchrun import connected\n"
        "os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='x', MASTER_PORT='1')\n"
        "with connected('torchrun') as ranks: assert ranks is None and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[07-09],m1"}


def test_places() -> None:
    by_torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert torchrun.place_of(None, SLURM | by_torchrun, started=False) is None
    assert torchrun.place_of(None, by_torchrun, started=True) == torchrun.Place(1, 2, "host", 29500)
    assert torchrun.place_of("torchrun", by_torchrun, started=False) == torchrun.Place(1, 2, "host", 29500)
    assert torchrun.place_of("slurm", SLURM, started=False) == torchrun.Place(3, 4, "n07", 20000 + 123456 % 12000)
    given = SLURM | {"MASTER_ADDR": "m1", "MASTER_PORT": "99", "SLURM_STEP_NODELIST": "m1"}
    assert torchrun.place_of("slurm", given, started=False) == torchrun.Place(3, 4, "m1", 99)


@pytest.mark.parametrize(
    ("kind", "environment", "message"),
    [
        ("torchrun", {}, "--ranks torchrun is given, but RANK is not set; start this command with torchrun"),
        ("slurm", {}, "--ranks slurm is given, but SLURM_PROCID is not set; start this command with srun"),
        ("slurm", SLURM | {"SLURM_NTASKS": "4(x2)"}, r"SLURM_NTASKS is '4\(x2\)', which is not a number"),
        ("slurm", SLURM | {"SLURM_JOB_NODELIST": ""}, "finds no SLURM_JOB_NODELIST"),
    ],
)
def test_places_that_are_not_there(kind: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchrun.place_of(kind, environment, started=False)


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "COME", timedelta(seconds=1))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RankError, match=r"rank 1 of 2 does not meet the others at 127.0.0.1:\d+ \("):  # noqa: SIM117
        with torchrun.connected("torchrun"):
            pass
