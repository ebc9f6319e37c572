"""Merges that went wrong, each in its way: an audit names it."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from audited import LINEAR, Case, states, summed
from checkpoints import State, random_state, read_model, write_model
from end_to_end import zoo
from mergekit_imm import audit
from merges import Edit, halves_exchanged, peft_merge, rewritten, write_adapter, write_base
from models import LAYOUTS


def test_nothing_was_merged(llama: Case) -> None:
    report = llama.audit(llama.base)
    assert report.verdict.kind == "not merged"
    assert report.verdict.line == "not merged: all 14 tensors that SFT changes are BASE's"
    assert all(each.coefficient == 0 for each in report.tensors if each.changed)


def test_the_adapter_was_saved_beside_the_weights(llama: Case, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LAYOUTS["llama"].auto.from_pretrained(llama.base, dtype=torch.bfloat16)
        wrapped = peft.PeftModel.from_pretrained(model, llama.adapter)
    shutil.copytree(llama.base, tmp_path / "out")
    tensors = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    report = llama.audit(tmp_path / "out")
    assert report.verdict.kind == "adapter apart"
    assert "in 28 tensors such as" in report.verdict.line
    assert states(report)["base"] == set(LINEAR)


def test_merged_twice(llama: Case, tmp_path: Path) -> None:
    report = llama.audit(peft_merge(llama.merged, llama.adapter, tmp_path / "out", "llama"))
    assert report.verdict.kind == "merged twice"
    assert "the change of all 14 tensors is 2 times what is claimed" in report.verdict.line


def test_part_of_the_modules_was_merged(llama: Case, tmp_path: Path) -> None:
    def fewer(_: dict[str, Any], tensors: State) -> None:
        for name in [n for n in tensors if "v_proj" in n or "layers.1.mlp.up_proj" in n]:
            del tensors[name]

    report = llama.merged_with(tmp_path, fewer)
    assert report.verdict.kind == "merged in part"
    assert "v_proj in both layers and up_proj in 1 of 2 layers (model.layers.1) are BASE's" in report.verdict.line


def setting(**values: Any) -> Edit:
    return lambda config, _: config.update(values)


def subtract(_: dict[str, Any], tensors: State) -> None:
    for name in [n for n in tensors if "lora_B" in n]:
        tensors[name] = -tensors[name]


@pytest.mark.parametrize(
    ("edit", "factor", "words"),
    [
        (setting(use_rslora=True), 8**0.5, "alpha / sqrt(r) was used, though use_rslora is off: it asks for alpha / r"),
        (setting(lora_alpha=12), 0.75, "as lora_alpha 12 in place of 16"),
        (setting(lora_alpha=8), 0.5, "B A was added without its scaling"),
        (setting(lora_alpha=128), 8, "alpha was not divided by r"),
        (subtract, -1, "it was subtracted"),
    ],
    ids=["rslora", "alpha", "unscaled", "undivided", "minus"],
)
def test_a_wrong_scaling_is_named_by_its_factor(
    llama: Case, tmp_path: Path, edit: Edit, factor: float, words: str
) -> None:
    report = llama.merged_with(tmp_path, edit)
    assert report.verdict.kind == "scaled"
    assert report.verdict.line.endswith(words)
    found = [each.factor for each in report.tensors if each.changed]
    assert found == pytest.approx([factor] * 14, rel=2e-3)


def test_an_adapter_of_several_ranks_scaled_by_their_roots_and_by_the_defaults(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 3}, "alpha_pattern": {"up_proj": 5}}
    case = Case(tmp_path, "llama", target_modules=LINEAR, use_rslora=True, **patterns)
    assert case.audit().is_as_claimed
    report = case.merged_with(tmp_path / "a", setting(use_rslora=False))
    assert report.verdict.line.endswith("alpha / r was used, though use_rslora asks for alpha / sqrt(r)")
    assert re.search(r"0\.35\d to 0\.70\d times", report.verdict.line)
    report = case.merged_with(tmp_path / "b", setting(alpha_pattern={}))
    assert "the change of up_proj in both layers is 3.2 times what is claimed" in report.verdict.line


@pytest.mark.parametrize(
    ("merge", "kind", "words"),
    [
        (lambda b, s: 0.7 * b + 0.3 * s, "scaled", "as of alpha 0.7, not 0.4"),
        (lambda b, s: 0.6 * b + 0.4 * s, "scaled", "alpha was taken as the weight of SFT"),
        (lambda b, s: 0.4 * b + 0.6 * (0.4 * b + 0.6 * s), "merged twice", "the first result as the SFT of the second"),
        (lambda _, s: s, "scaled", "MERGED is SFT itself"),
        (lambda b, _: b, "not merged", "all 21 tensors that SFT changes are BASE's"),
    ],
)
def test_a_wrong_weighted_sum(full: Path, tmp_path: Path, merge: Any, kind: str, words: str) -> None:
    report = audit(summed(full, tmp_path / "out", merge), full / "base", full / "sft", alpha=0.4)
    assert report.verdict.kind == kind
    assert words in report.verdict.line


def test_elements_were_dropped(full: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    merged = summed(
        full, tmp_path / "out", lambda b, s: b + 0.5 * (s - b) * (torch.rand(b.shape, generator=draw) < 0.2) / 0.2
    )
    report = audit(merged, full / "base", full / "sft", alpha=0.5)
    assert report.verdict.kind == "dropped"
    assert "about 80% of the change is missing" in report.verdict.line
    assert "the rest is 5 times what is claimed" in report.verdict.line


def gates_of(state: State) -> list[tuple[str, str]]:
    return [(name, name.replace("gate_proj", "up_proj")) for name in state if "gate_proj" in name]


def test_gate_and_up_are_exchanged(llama: Case, tmp_path: Path) -> None:
    def swap(_: Any, state: State) -> None:
        for gate, up in gates_of(state):
            state[gate], state[up] = state[up], state[gate]

    report = llama.rewritten(tmp_path / "whole", lambda state: swap(None, state))
    assert report.verdict.kind == "exchanged"
    assert report.verdict.line.endswith("are as claimed, but gate_proj and up_proj are exchanged")
    report = llama.merged_with(tmp_path, swap)
    assert report.verdict.line.endswith("but in the change, gate_proj and up_proj are exchanged")


def test_halves_of_a_fused_projection_are_exchanged(tmp_path: Path) -> None:
    zoo.new_model("phi3", tied=False).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = read_model(tmp_path / "base")
    delta = random_state({n: t.shape for n, t in base.items()}, seed=3, dtype=torch.float32)
    sft = {n: (t.float() + delta[n]).bfloat16() for n, t in base.items()}
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    write_model(tmp_path / "sft", sft, config=config)
    merged = {n: t.clone() for n, t in sft.items()}
    for name, tensor in sft.items():
        if "gate_up_proj" in name:
            merged[name] = halves_exchanged(tensor, 0)
        if "qkv_proj" in name:  # 4 heads of queries, 2 of keys and of values, of 4 elements
            q, k, v = tensor[:16], tensor[16:24], tensor[24:]
            merged[name] = torch.cat([q, v, k])
    write_model(tmp_path / "out", merged, config=config)
    report = audit(tmp_path / "out", tmp_path / "base", tmp_path / "sft", method="lora")
    lines = sorted(each.line for each in report.verdict.findings)
    assert "gate_up_proj in both layers are as claimed, but its halves (gate and up) are exchanged" in lines[0]
    assert "qkv_proj in both layers are as claimed, but its parts are in the order q, v, k" in lines[1]


def expert_major(_: Any, tensors: State) -> None:
    for name in [n for n in tensors if "experts" in n and "lora_B" in n]:
        tensor = tensors[name]
        rank = tensor.shape[1] // 4
        tensors[name] = tensor.reshape(len(tensor), 4, rank).transpose(1, 2).reshape(tensor.shape)


def test_lora_b_of_experts_was_read_in_another_order(experts: Case, tmp_path: Path) -> None:
    report = experts.merged_with(tmp_path, expert_major)
    assert report.verdict.kind == "exchanged"
    assert "the columns of lora_B were taken expert by expert" in report.verdict.line
    assert states(report)["exchanged"] == {"experts.gate_up_proj", "experts.down_proj"}


@pytest.mark.parametrize(
    ("change", "kinds", "words"),
    [
        (lambda t: t[[2, 0, 3, 1]], ["gate_up", "down"], "the experts are in another order"),
        (lambda t: t.mT, ["down_proj"], "each expert is transposed"),
        (
            lambda t: torch.cat([t[..., 0::2], t[..., 1::2]], -1),
            ["gate_up"],
            "its halves (gate and up), interleaved in the claim, are one after the other",
        ),
    ],
)
def test_experts_are_turned(experts: Case, tmp_path: Path, change: Any, kinds: list[str], words: str) -> None:
    def turn(state: State) -> None:
        for name in [n for n in state if ".experts." in n and any(kind in n for kind in kinds)]:
            if state[name].dim() == 3 or "transposed" not in words:
                state[name] = change(state[name])

    report = experts.rewritten(tmp_path, turn)
    assert report.verdict.kind == "exchanged"
    assert report.verdict.line.endswith(words)
    assert len(report.verdict.findings) == 1


def test_single_experts_are_in_another_order_or_the_base_s(tmp_path: Path) -> None:
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    case = Case(tmp_path, "qwen3_moe", target_modules=["q_proj"], target_parameters=both)
    assert case.audit().is_as_claimed
    base = read_model(case.base)

    def shift(state: State) -> None:
        before = dict(state)
        for name in [n for n in state if ".experts." in n]:
            head, _, rest = name.partition(".experts.")
            number, _, end = rest.partition(".")
            state[name] = before[f"{head}.experts.{(int(number) + 1) % 4}.{end}"]

    assert case.rewritten(tmp_path / "a", shift).verdict.line.endswith("the experts are in another order")
    report = case.rewritten(tmp_path / "b", lambda s: s.update({n: base[n] for n in s if ".experts." in n}))
    assert report.verdict.kind == "merged in part"
    assert states(report)["base"] == {"experts.gate_proj", "experts.up_proj", "experts.down_proj"}


def test_dora_was_merged_without_its_magnitudes(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", target_modules=LINEAR, use_dora=True)
    assert case.audit().is_as_claimed

    def plain(config: dict[str, Any], tensors: State) -> None:
        config["use_dora"] = False
        for name in [n for n in tensors if "magnitude" in n]:
            del tensors[name]

    report = case.merged_with(tmp_path, plain)
    assert report.verdict.kind == "DoRA left out"


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_merge_that_went_through_16_bits(tmp_path: Path, narrow: torch.dtype) -> None:
    base = write_base(tmp_path / "base", "llama", torch.float32)
    adapter = write_adapter(base, tmp_path / "adapter", "llama", target_modules=LINEAR)
    merged = peft_merge(base, adapter, tmp_path / "out", "llama", narrow, stored=torch.float32)
    report = audit(merged, base, adapter)
    name = {"torch.float16": "F16", "torch.bfloat16": "BF16"}[str(narrow)]
    assert [each.kind for each in report.verdict.findings] == [f"rounded through {name}"]
    assert audit(peft_merge(base, adapter, tmp_path / "right", "llama", torch.float32), base, adapter).is_as_claimed


def test_a_bfloat16_merge_that_went_through_float16(tmp_path: Path) -> None:
    """Small numbers lose their bits, and only those: a few in ten thousand."""
    name = "model.layers.0.mlp.up_proj.weight"
    base, noise = (random_state({name: (512, 512)}, seed=s, scale=0.01, dtype=torch.float32)[name] for s in (1, 2))
    write_model(tmp_path / "base", {name: base.bfloat16()})
    sft = (base.bfloat16().float() + 0.1 * noise).bfloat16()
    write_model(tmp_path / "sft", {name: sft})
    write_model(tmp_path / "out", {name: sft.half().bfloat16()})
    report = audit(tmp_path / "out", tmp_path / "base", tmp_path / "sft", method="lora")
    assert [each.kind for each in report.verdict.findings] == ["rounded through F16"]
    assert audit(tmp_path / "sft", tmp_path / "base", tmp_path / "sft", method="lora").is_as_claimed


def test_another_adapter_and_another_base(llama: Case, tmp_path: Path) -> None:
    other = write_adapter(llama.base, tmp_path / "other", "llama", seed=9, target_modules=LINEAR)
    report = audit(llama.merged, llama.base, other)
    assert report.verdict.kind == "not as claimed"
    assert "explains 0% of the difference from BASE" in report.verdict.line
    base = rewritten(llama.base, tmp_path / "base", lambda s: s.update({n: t * 1.25 for n, t in s.items()}))
    report = audit(peft_merge(base, llama.adapter, tmp_path / "out", "llama"), llama.base, llama.adapter)
    assert not report.is_as_claimed
    assert "another base" in [each.kind for each in report.verdict.findings]


def test_one_damaged_element_is_counted(llama: Case, tmp_path: Path) -> None:
    def damage(state: State) -> None:
        state["model.layers.0.mlp.up_proj.weight"][5, 7] += 0.5
        state["model.norm.weight"][3] += 0.5

    report = llama.rewritten(tmp_path, damage)
    assert [each.kind for each in report.verdict.findings] == ["not as claimed", "another base"]
    assert "in up_proj in 1 of 2 layers (model.layers.0) 1 of 2048 elements are off" in report.verdict.line
    assert "norm, which SFT does not change, is not BASE's" in report.verdict.findings[1].line


def without(name: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(name)


def test_nan_and_what_is_missing(llama: Case, tmp_path: Path) -> None:
    def nan(state: State) -> None:
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    assert llama.rewritten(tmp_path / "a", nan).verdict.kind == "not finite"
    report = llama.rewritten(tmp_path / "b", without("lm_head.weight"))
    assert report.verdict.kind == "head lost"
    report = llama.rewritten(tmp_path / "c", without("model.layers.1.mlp.up_proj.weight"))
    assert report.verdict.line == "lost: up_proj in 1 of 2 layers (model.layers.1) is not in MERGED"


def test_a_head_trained_apart_is_lost_or_tied_away(tmp_path: Path) -> None:
    case = Case(tmp_path, "qwen2", target_modules=["k_proj"], modules_to_save=["lm_head"])
    report = case.audit()
    assert report.is_as_claimed, report.verdict
    lost = case.rewritten(tmp_path / "a", without("lm_head.weight"))
    assert lost.verdict.kind == "head lost"


def test_tokenizers(llama: Case, tmp_path: Path) -> None:
    shutil.copytree(llama.merged, tmp_path / "none")
    for file in (tmp_path / "none").glob("*token*"):
        file.unlink()
    report = llama.audit(tmp_path / "none")
    assert report.verdict.kind == "tokenizer"
    assert "MERGED has none" in report.verdict.line
    shutil.copytree(llama.merged, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace("merge", "purge"))
    assert "1 ids are different tokens" in llama.audit(tmp_path / "other").verdict.line


def test_a_square_matrix_is_transposed(full: Path, tmp_path: Path) -> None:
    merged = summed(full, tmp_path / "right", lambda b, s: 0.5 * b + 0.5 * s)
    assert audit(merged, full / "base", full / "sft", alpha=0.5).is_as_claimed
    square = [n for n, t in read_model(merged).items() if n.endswith("o_proj.weight") and t.shape[0] == t.shape[1]]
    assert square

    def turn(state: State) -> None:
        state.update({name: state[name].T.contiguous() for name in square})

    report = audit(rewritten(merged, tmp_path / "turned", turn), full / "base", full / "sft", alpha=0.5)
    assert report.verdict.line.startswith("exchanged: o_proj in ")
    assert report.verdict.line.endswith("as claimed, but it is transposed")
