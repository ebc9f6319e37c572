"""Folders are merged, verified and compared without torch, to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import random_state, write_model
from commands import HUNG
from mergekit_imm import merge_checkpoints

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.mlp.up_proj.weight": (16, 64),
    "model.norm.weight": (16,),
}
WITHOUT = (
    "import sys; sys.modules['torch'] = None; from mergekit_imm.__main__ import {0}\n"
    "sys.argv = ['{1}', *sys.argv[1:]]\n"
    "{0}()"
)


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(program, program.replace("_", "-"))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HUNG, check=False)


def test_everything_about_folders(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_state(SHAPES))
    sft = write_model(tmp_path / "sft", random_state(SHAPES, seed=1))
    merge_checkpoints(base, sft, tmp_path / "with", alpha=0.3, sparsify="trim", dtype="float32")
    options = ("--alpha", 0.3, "--sparsify", "trim", "--dtype", "float32")
    ended = run("imm_merge", base, sft, "-o", tmp_path / "without", *options, "--digests")
    assert ended.returncode == 0, ended.stderr
    for file in sorted((tmp_path / "with").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "without" / file.name).read_bytes()
    for program, arguments in {
        "imm_verify": (tmp_path / "without",),
        "imm_analyze": ("change", base, sft),
    }.items():
        ended = run(program, *arguments)
        assert ended.returncode == 0, ended.stderr
    audited = run("imm_verify", tmp_path / "without", "--base", base, "--sft", sft, "--alpha", 0.3)
    assert audited.returncode in (0, 1), audited.stderr


@pytest.mark.parametrize("name", ["dare_merge", "merge_into", "merged_stream", "keep_mask"])
def test_what_needs_torch_says_so(name: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mergekit_imm\n"
        f"try:\n    mergekit_imm.{name}\nexcept mergekit_imm.MergeError as error:\n    print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HUNG, check=False)
    assert ended.stdout == f"{name} needs torch, which is not installed; pip install 'torch>=2.5'\n", ended.stderr
