"""Models in formats other than safetensors, written by torch, transformers and peft: merged to the same bytes as in
safetensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import HUNG
from other_forms import SFT


@pytest.fixture(scope="package")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sft as two training ranks store it, in all layouts."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(SFT, folder / "state.pt")
    script = Path(__file__).parent.parent / "support" / "saving_ranks.py"
    command = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    both = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    told = [each.communicate(timeout=HUNG)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], told
    return folder
