"""The models that audits share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from audited import LINEAR, Case
from merges import write_base
from models import LAYOUTS, fine_tuned, save


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama", target_modules=LINEAR)


@pytest.fixture(scope="package")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Case:
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return Case(tmp_path_factory.mktemp("experts"), "gpt_oss", target_modules=["q_proj"], target_parameters=both)


@pytest.fixture(scope="package")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a full fine-tuning of it."""
    folder = tmp_path_factory.mktemp("full")
    base = write_base(folder / "base", "llama")
    model = LAYOUTS["llama"].auto.from_pretrained(base, dtype=torch.bfloat16)
    save(fine_tuned(model, 3), folder / "sft", "sft")
    return folder
