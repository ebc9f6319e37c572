"""Different spellings of an input's path, and `imm-verify` from any folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import files_of, random_state, write_model
from commands import CONFIG, SHAPES, SIDE, write_pair
from mergekit_imm import MergeReport, OutputError, VerifyError, merge_checkpoints, verify
from mergekit_imm.errors import CheckpointError
from refused import everything

SPELLINGS: dict[str, Callable[[str], str | Path]] = {
    "dot": lambda name: f"./{name}",
    "slash": lambda name: f"{name}/",
    "absolute": lambda name: f"{Path.cwd()}/{name}",
    "through": lambda name: f"{name}/../{name}",
    "path": lambda name: Path.cwd() / name,
    "link": lambda name: f"link-to-{name}",
    "home": lambda name: f"~/{name}",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_pair(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("base", "sft", "start"):
        Path(f"link-to-{name}").symlink_to(name)
    merge_checkpoints("base", "sft", "start", alpha=0.25)
    return tmp_path


def merge(spell: Callable[[str], str | Path], out: str = "out", **options: Any) -> MergeReport:
    report: MergeReport = merge_checkpoints(
        spell("base"), spell("sft"), out, start=spell("start"), workers=1, **options
    )
    return report


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_merge_is_the_same_however_its_inputs_are_typed(here: Path, spelling: str) -> None:
    merge(str)
    before = everything(here / "out")
    several: list[dict[str, Any]] = [{}, {"dry_run": True}, {"verify": True}, {"overwrite": True}]
    for options in several:
        assert merge(SPELLINGS[spelling], **options).status == "already merged"
    assert everything(here / "out") == before
    with pytest.raises(OutputError, match=r"holds another merge \(parameters\.alpha: 0\.5, now 0\.75\); give another"):
        merge(SPELLINGS[spelling], alpha=0.75)


def test_a_file_is_not_the_folder_that_it_lies_in(here: Path) -> None:
    """A folder brings its side files, a single file does not."""
    (here / "sft" / "chat_template.jinja").write_text("the sft's")
    merge_checkpoints("base", "sft/model.safetensors", "out")
    with pytest.raises(OutputError, match=r"holds another merge \(inputs\.sft\.form: \S*one file"):
        merge_checkpoints("base", "sft", "out")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_merge_goes_on_however_its_inputs_are_typed(
    here: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(str, "whole")
    monkeypatch.setattr("mergekit_imm.engine.stream.SYNC_BYTES", 1)  # journal every piece

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(str, progress=stop)
    report = merge(SPELLINGS[spelling])
    assert report.status == "merged"
    assert 0 < report.bytes_written < merge(str, "again").bytes_written
    assert files_of(here / "out") == files_of(here / "whole")  # the same bytes as an uninterrupted merge
    verify("out")


def test_another_model_in_its_place_is_another_merge(here: Path) -> None:
    merge(str)
    write_model(here / "sft", random_state(SHAPES, seed=9), config=CONFIG, side=SIDE)
    with pytest.raises(OutputError, match=r"holds another merge \(inputs\.sft\.files\.model\.safetensors has changed"):
        merge(SPELLINGS["absolute"])


def test_the_rounds_before_may_be_typed_in_another_way(here: Path) -> None:
    merge(str)
    merge_checkpoints(here / "base", here / "sft", "start2", alpha=0.25)
    (here / "start").rename("old")
    (here / "start2").rename("start")
    assert merge(str).status == "already merged"
    verify("out")
    merge_checkpoints("base", "sft", "start2", alpha=0.75)
    with pytest.raises(OutputError, match="holds another merge"):
        merge_checkpoints("base", "sft", "out", start="start2")


def test_a_recipe_that_says_something_else_is_not_the_same(here: Path) -> None:
    merge(str)
    recipe = here / "out" / "imm_recipe.json"
    content = json.loads(recipe.read_text())
    content["formula"] = "x"
    recipe.write_text(json.dumps(content))
    with pytest.raises(OutputError, match="holds another merge"):
        merge(str)
    with pytest.raises(VerifyError, match="its formula differs from this merge's"):
        verify("out")


def test_inputs_are_found_from_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = here / "runs" / "one" / "out"
    deep.parent.mkdir(parents=True)
    merge(str, "runs/one/out")
    expected = verify(deep).files_compared
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert verify(deep).files_compared == expected
    assert verify("../runs/one/out").files_compared == expected
    monkeypatch.chdir(deep)
    assert verify(".").files_compared == expected
    # The path leads to another model from here, to the right one from where the merge ran.
    monkeypatch.chdir(elsewhere)
    write_model(elsewhere / "sft", random_state(SHAPES, seed=9), config=CONFIG, side=SIDE)
    assert verify(deep).files_compared == expected
    os.rename(here / "sft", here / "moved")  # noqa: PTH104
    with pytest.raises(CheckpointError, match=r"^sft sft is not what was merged: its model\.safetensors has changed"):
        verify(deep)
    (elsewhere / "sft" / "model.safetensors").unlink()
    (elsewhere / "sft").rename(elsewhere / "other")
    message = f"^sft sft does not exist, neither in {elsewhere} nor in {deep.parent} or a folder above it; if it has"
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(deep)
    assert str(caught.value).endswith("say where it is with sft")
    assert verify(deep, sft=here / "moved").files_compared == expected
    with pytest.raises(CheckpointError, match=r"^sft nowhere does not exist"):
        verify(deep, sft="nowhere")


def test_a_name_like_a_hub_id_is_a_folder_that_is_gone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge asked no hub, and neither does its verification."""
    (here / "org").mkdir()
    (here / "sft").rename(here / "org" / "sft")
    merge_checkpoints("base", "org/sft", "out")
    (here / "org" / "sft").rename(here / "gone")

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("mergekit_imm.checkpoint.hub.fetch", asked)
    with pytest.raises(CheckpointError, match=r"^sft org/sft does not exist, neither in"):
        verify("out")


def test_check_counts_what_an_adapter_holds(here: Path) -> None:
    from safetensors.torch import save_file

    from mergekit_imm.plan.describe import check

    adapter = here / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.mlp"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["mlp"]})
    )
    report = check("base", adapter)
    assert not report.problems
    base, sft = report.inputs
    assert (base["tensors"], base["parameters"]) == (5, 32 * 8 + 8 * 8 + 8 * 8 + 8 + 32 * 8)
    assert (sft["form"], sft["tensors"], sft["parameters"]) == ("LoRA adapter", 2, 2 * 8 + 8 * 2)
