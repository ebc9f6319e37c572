"""Side files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoints import files_of
from mergekit_imm import merge_checkpoints


@pytest.mark.parametrize("rows", [96, 100])
def test_with_the_base_s_vocabulary_all_other_files_are_the_base_s(
    resized: tuple[str, Path], tmp_path: Path, rows: int
) -> None:
    _, folder = resized
    shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copytree(folder / ("sft" if rows == 100 else "base"), tmp_path / "sft")
    for role in ("base", "sft"):
        (tmp_path / role / "chat_template.jinja").write_text(f"{{{{ {role} }}}}")
    (tmp_path / "sft" / "special.json").write_text("{}")
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", vocab="base")
    assert set(report.side_files) == {"base"}
    assert {"special.json", "tokenizer.json", "config.json", "generation_config.json"} <= {*report.left_out["sft"]}
    out, base = files_of(tmp_path / "out"), files_of(tmp_path / "base")
    others = set(base) - {name for name in base if name.startswith("model")}
    assert {name: out[name] for name in others} == {name: base[name] for name in others}
    assert "special.json" not in out
    assert report.config_changes == {}
