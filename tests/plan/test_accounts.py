"""A plan that loses a tensor is found before a byte is written, wherever the fault is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from checkpoints import random_state, write_model
from mergekit_imm.errors import PlanError
from mergekit_imm.options.options import MergeOptions
from mergekit_imm.plan.accounts import check_plan, check_tensors
from mergekit_imm.plan.decide import Decided, decide
from mergekit_imm.plan.make_plan import comparer, unchecked_plan
from mergekit_imm.plan.open_inputs import open_inputs
from mergekit_imm.plan.plan import Plan

EMBED, HEAD, UP, NORM = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",
    "norm.weight",
)
SHAPES = {EMBED: (40, 16), UP: (16, 64), NORM: (16,)}


def planned(folder: Path, *, apart: bool = False) -> tuple[Decided, Plan]:
    """A merge of a tied base with an sft, untied if `apart`."""
    base = random_state(SHAPES)
    sft = random_state(SHAPES, seed=1) | ({HEAD: random_state({HEAD: (40, 16)}, seed=2)[HEAD]} if apart else {})
    config = {"model_type": "llama", "tie_word_embeddings": True}
    write_model(folder / "base", base, config=config)
    write_model(folder / "sft", sft, config=config)
    save_file(random_state({"v_head.weight": (4,)}), folder / "base" / "value_head.safetensors")
    save_file(random_state({"v_head.weight": (4,)}, seed=3), folder / "sft" / "value_head.safetensors")
    inputs = open_inputs({"base": folder / "base", "sft": folder / "sft"}, MergeOptions())
    (options,) = inputs.options
    decided = decide(inputs.models, options, comparer(inputs.models))
    return decided, unchecked_plan(inputs.models, options, decided)


def refuse(decided: Decided, plan: Plan) -> None:
    check_tensors(decided, comparer(decided.used))
    check_plan(plan, decided.ties)


@pytest.mark.parametrize("apart", [False, True])
def test_a_whole_plan_passes(tmp_path: Path, apart: bool) -> None:
    decided, plan = planned(tmp_path, apart=apart)
    refuse(decided, plan)
    assert (HEAD in {out.name for item in plan.items for out in item.outs}) == apart


@pytest.mark.parametrize("name", [EMBED, UP, "v_head.weight", HEAD])
def test_a_tensor_of_which_nothing_is_made_is_found(tmp_path: Path, name: str) -> None:
    decided, plan = planned(tmp_path, apart=True)
    lost = replace(decided, items=[item for item in decided.items if item.name != name])
    with pytest.raises(PlanError, match=r"this is a bug in mergekit_imm: .*nothing was written"):
        check_tensors(lost, comparer(lost.used))
    with pytest.raises(PlanError):
        check_plan(replace(plan, items=tuple(item for item in plan.items if item.name != name)), decided.ties)


def test_a_side_that_takes_no_part_is_found(tmp_path: Path) -> None:
    decided, _ = planned(tmp_path)
    items = [replace(item, sides={"base": item.sides["base"]}) if item.name == UP else item for item in decided.items]
    lost = replace(decided, items=items)
    with pytest.raises(PlanError, match=f"tensor '{UP}' of sft .* would not enter"):
        check_tensors(lost, comparer(lost.used))


def test_a_tensor_that_was_lost_as_files_were_opened_is_found(tmp_path: Path) -> None:
    decided, _ = planned(tmp_path)
    sft = decided.used["sft"]
    without = replace(sft, tensors={name: tensor for name, tensor in sft.tensors.items() if name != "v_head.weight"})
    with pytest.raises(
        PlanError, match=r"tensor 'v_head\.weight' in value_head\.safetensors of sft .* would not be read"
    ):
        check_tensors(replace(decided, used={**decided.used, "sft": without}), comparer(decided.used))


def test_one_side_read_for_another_is_found(tmp_path: Path) -> None:
    decided, _ = planned(tmp_path)
    sft = decided.used["sft"].tensors
    items = [
        replace(item, sides={**item.sides, "sft": sft[UP]}) if item.name == EMBED else item for item in decided.items
    ]
    with pytest.raises(PlanError, match="is not what is read for"):
        check_tensors(replace(decided, items=items), comparer(decided.used))


@pytest.mark.parametrize("apart", [False, True])
def test_a_config_that_says_other_than_what_is_written_is_found(tmp_path: Path, apart: bool) -> None:
    decided, plan = planned(tmp_path, apart=apart)
    config = json.dumps({"model_type": "llama", "tie_word_embeddings": apart}).encode()
    wrong = replace(plan, configs={"config.json": config})
    if not apart:  # without a stored head there is no tie to check
        check_plan(wrong, decided.ties)
        return
    with pytest.raises(PlanError, match=r"config\.json would say tied"):
        check_plan(wrong, decided.ties)


def test_a_name_that_is_written_twice_is_found(tmp_path: Path) -> None:
    decided, plan = planned(tmp_path)
    with pytest.raises(PlanError, match="would be written twice"):
        check_plan(replace(plan, items=(*plan.items, plan.items[0])), decided.ties)
