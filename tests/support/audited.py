"""A case of an audit: a base, its adapter, PEFT's merge of them, and weighted sums of two models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints import State, read_model
from mergekit_imm import audit
from mergekit_imm.analysis.auditing import AuditReport
from merges import Edit, edited, peft_merge, rewritten, write_adapter, write_base

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def states(report: AuditReport) -> dict[str, set[str]]:
    """The kinds of modules that ended in each way."""
    found: dict[str, set[str]] = {}
    for each in report.tensors:
        found.setdefault(each.state, set()).add(each.kind)
    return found


class Case:
    """A base, its adapter and PEFT's merge of them, in bfloat16."""

    def __init__(self, folder: Path, layout: str, **options: Any) -> None:
        self.folder, self.layout = folder, layout
        self.base = write_base(folder / "base", layout)
        self.adapter = write_adapter(self.base, folder / "adapter", layout, **options)
        self.merged = peft_merge(self.base, self.adapter, folder / "merged", layout)

    def audit(self, merged: Path | None = None, **options: Any) -> AuditReport:
        return audit(merged or self.merged, self.base, self.adapter, **options)

    def merged_with(self, folder: Path, edit: Edit) -> AuditReport:
        """Audit PEFT's merge of the adapter as something else reads it."""
        wrong = edited(self.adapter, folder / "read", edit)
        return self.audit(peft_merge(self.base, wrong, folder / "out", self.layout))

    def rewritten(self, folder: Path, change: Callable[[State], None]) -> AuditReport:
        return self.audit(rewritten(self.merged, folder / "out", change))


def summed(folder: Path, out: Path, merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Path:
    """Write what a naive merge in float32 gives."""
    shutil.copytree(folder / "sft", out)
    base, sft = read_model(folder / "base"), read_model(folder / "sft")
    merged = {name: merge(base[name].float(), sft[name].float()).to(base[name].dtype) for name in base}
    save_file(merged, out / "model.safetensors")
    return out


# --- right ones
