"""Merges that PEFT made, rightly and wrongly, audited; sums against a naive reference."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from adapters import KINDS, train
from checkpoints import State, random_state, read_model, write_model
from end_to_end import zoo
from mergekit_imm import ArgumentError, CheckpointError, audit
from mergekit_imm.analysis.audit_sums import Sums, measure
from mergekit_imm.analysis.audit_tensors import state_of
from mergekit_imm.analysis.auditing import AuditReport
from merges import Edit, edited, halves_exchanged, peft_merge, rewritten, write_adapter, write_base
from models import LAYOUTS, fine_tuned, save
from thorough import others

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama", target_modules=LINEAR)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Case:
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return Case(tmp_path_factory.mktemp("experts"), "gpt_oss", target_modules=["q_proj"], target_parameters=both)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a full fine-tuning of it."""
    folder = tmp_path_factory.mktemp("full")
    base = write_base(folder / "base", "llama")
    model = LAYOUTS["llama"].auto.from_pretrained(base, dtype=torch.bfloat16)
    save(fine_tuned(model, 3), folder / "sft", "sft")
    return folder


def summed(folder: Path, out: Path, merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Path:
    """Write what a naive merge in float32 gives."""
    shutil.copytree(folder / "sft", out)
    base, sft = read_model(folder / "base"), read_model(folder / "sft")
    merged = {name: merge(base[name].float(), sft[name].float()).to(base[name].dtype) for name in base}
    save_file(merged, out / "model.safetensors")
    return out


# --- right ones


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_merged_in_float32_is_as_claimed(tmp_path: Path, kind: str) -> None:
    train(tmp_path, *KINDS[kind])
    report = audit(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter")
    assert report.is_as_claimed, report.verdict
    assert "within rounding of F32" in report.verdict.line
    assert states(report).keys() == {"as claimed", "unchanged"}


ARCHITECTURES = ("llama", "gpt2", "gpt_oss", "qwen3_moe")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", [*ARCHITECTURES, *others(*(name for name in zoo.ARCHITECTURES if name not in ARCHITECTURES))]
)
def test_no_right_merge_of_any_architecture_alarms(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """With changes of all sizes down to a few steps of the dtype; and where the base itself is there, it is seen."""
    model = zoo.new_model(name, tied=True).to(dtype)
    model.save_pretrained(tmp_path / "base")
    rest = {"target_parameters": list(zoo.ARCHITECTURES[name].experts)} if zoo.ARCHITECTURES[name].experts else {}
    leaves = [leaf for leaf in zoo.linear_leaves(name) if leaf != "proj"]  # of images: convolutions
    ways: list[tuple[float, dict[str, Any]]] = [(0.05, rest), (0.003, {}), (0.02, {"use_rslora": True})]
    for number, (size, options) in enumerate(ways):
        adapter, merged = tmp_path / f"adapter-{number}", tmp_path / f"merged-{number}"
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(number)
            base = zoo.auto_of(name).from_pretrained(tmp_path / "base", dtype=dtype)
            settings = peft.LoraConfig(
                task_type=zoo.ARCHITECTURES[name].task, r=4, lora_alpha=8, target_modules=leaves, **options
            )
            wrapped = peft.get_peft_model(copy.deepcopy(base), settings)
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.add_((torch.randn(parameter.shape) * size).to(parameter.dtype))
            wrapped.save_pretrained(adapter)
            peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(merged)
        report = audit(merged, tmp_path / "base", adapter)
        assert report.is_as_claimed, (size, report.verdict)
        assert audit(tmp_path / "base", tmp_path / "base", adapter).verdict.kind == "not merged"


@pytest.mark.parametrize("alpha", [0.5, *others(0.3, 0.9)])
def test_weighted_sums_are_as_claimed_and_the_alpha_is_found(full: Path, tmp_path: Path, alpha: float) -> None:
    merged = summed(full, tmp_path / "out", lambda b, s: alpha * b + (1 - alpha) * s)
    assert audit(merged, full / "base", full / "sft", alpha=alpha).is_as_claimed
    assert audit(merged, full / "base", full / "sft", weights=(alpha, 1 - alpha)).is_as_claimed
    report = audit(merged, full / "base", full / "sft")
    assert report.is_as_claimed
    assert f"alpha {alpha:g} fits best" in report.verdict.line
    assert audit(full / "sft", full / "base", full / "sft", method="lora").is_as_claimed


def test_a_sum_whose_weights_are_not_one_in_all(full: Path, tmp_path: Path) -> None:
    merged = summed(full, tmp_path / "out", lambda b, s: 0.6 * b + 0.7 * s)
    assert audit(merged, full / "base", full / "sft", weights=(0.6, 0.7)).is_as_claimed
    assert audit(full / "base", full / "base", full / "sft", weights=(0.6, 0.7)).verdict.kind == "not merged"
    report = audit(merged, full / "base", full / "sft", weights=(0.5, 0.5))
    assert "0.6 BASE + 0.7 SFT fits them" in report.verdict.line


def test_bfloat16_stored_in_float32_is_as_claimed(llama: Case, tmp_path: Path) -> None:
    wide = peft_merge(llama.base, llama.adapter, tmp_path / "wide", "llama", torch.bfloat16, stored=torch.float32)
    report = llama.audit(wide)
    assert report.is_as_claimed
    assert "within rounding of BF16" in report.verdict.line


def test_a_change_computed_in_bfloat16_and_added_in_float32_passes_with_a_remark(tmp_path: Path) -> None:
    base, sft = (random_state({"model.layers.0.w.weight": (64, 64)}, seed=s, dtype=torch.float32) for s in (1, 2))
    name = next(iter(base))
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "sft", {name: base[name] + 0.1 * sft[name]})
    delta = (0.1 * sft[name]).to(torch.bfloat16).float()
    write_model(tmp_path / "out", {name: base[name] + delta})
    report = audit(tmp_path / "out", tmp_path / "base", tmp_path / "sft", method="lora")
    assert report.is_as_claimed
    assert report.verdict.line.endswith("1 of them computed less precisely")


# --- wrong ones


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


@pytest.mark.parametrize("layout", ["llama", *others("qwen2")])
def test_added_tokens(tmp_path: Path, layout: str) -> None:
    base = write_base(tmp_path / "base", layout)
    saved = ["embed_tokens", "lm_head"] if layout == "llama" else ["embed_tokens"]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = LAYOUTS[layout].auto.from_pretrained(base, dtype=torch.bfloat16)
        model.resize_token_embeddings(100, mean_resizing=False)
        settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], modules_to_save=saved)
        wrapped = peft.get_peft_model(model, settings)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_((torch.randn(parameter.shape) * 0.05).to(parameter.dtype))
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"<t{number}>" for number in range(4)])
        wrapped.save_pretrained(tmp_path / "adapter")
        wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
        for folder in ("adapter", "merged"):
            tokenizer.save_pretrained(tmp_path / folder)
    report = audit(tmp_path / "merged", base, tmp_path / "adapter")
    assert report.is_as_claimed, report.verdict

    def rows(state: State, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        state.update({name: change(t) for name, t in state.items() if t.shape[0] == 100})

    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cut": lambda t: t[:96],
        "random": lambda t: torch.cat([t[:97], t[97:] + 1]),
        "padded": lambda t: torch.cat([t, t[:28] * 0]),
    }
    for name, change in changes.items():
        merged = rewritten(tmp_path / "merged", tmp_path / name, lambda s, c=change: rows(s, c))  # type: ignore[misc]
        report = audit(merged, base, tmp_path / "adapter")
        if name == "padded":
            assert report.is_as_claimed
            assert any("has 128 rows, 28 more than claimed" in note for note in report.notes)
        else:
            assert report.verdict.kind == "rows lost"


def test_what_changes_nothing_tells_nothing(llama: Case, tmp_path: Path) -> None:
    zero = write_adapter(llama.base, tmp_path / "zero", "llama", size=0, target_modules=LINEAR)
    report = audit(llama.base, llama.base, zero)
    assert (report.verdict.kind, report.is_as_claimed) == ("untold", False)
    assert report.verdict.line == "nothing can be told: SFT changes nothing"
    faint = write_adapter(llama.base, tmp_path / "faint", "llama", size=1e-5, target_modules=LINEAR)
    report = audit(peft_merge(llama.base, faint, tmp_path / "out", "llama"), llama.base, faint)
    assert report.verdict.kind == "untold"
    assert "smaller than the steps" in report.verdict.line


# --- refused


def test_an_adapter_in_place_of_a_merge_is_refused(llama: Case) -> None:
    with pytest.raises(CheckpointError, match=r"merged .* is an adapter: nothing is merged there"):
        llama.audit(llama.adapter)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "slerp"}, "it must be one of lora, imm, linear"),
        ({"alpha": 1}, "0 <= alpha < 1"),
        ({"alpha": 0.5, "method": "lora"}, "alpha is of method imm"),
        ({"weights": (0.5,)}, "give two numbers"),
        ({"weights": (1, 0)}, "not 0"),
        ({"method": "linear"}, "needs weights"),
        ({"method": "imm", "weights": (0.5, 0.5)}, "weights are of method linear"),
    ],
)
def test_options_that_do_not_go_together(llama: Case, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        llama.audit(**options)


def test_a_model_that_is_none_is_refused_by_its_place(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"merged .* does not exist"):
        llama.audit(tmp_path / "gone")


# --- the sums


def naive(b: np.ndarray, d: np.ndarray, m: np.ndarray, p: float, q: float, dtype: torch.dtype) -> dict[str, float]:
    """The sums that have a formula, element by element in float64; rounded once, to whole steps, half to even."""

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.array([round(float(v) / _step(abs(float(v)), dtype)) * _step(abs(float(v)), dtype) for v in x])

    b, d, m = (x.astype(np.float64) for x in (b, d, m))
    claim, move = p * b + q * d, m - p * b
    clear = np.abs(d) >= 2 * np.array([_step(x, dtype) for x in np.maximum(np.abs(b), np.abs(claim))])
    return {
        "count": len(m),
        "as_base": int((m == rounded(b)).sum()),
        "visible": int((rounded(claim) != rounded(b)).sum()),
        "bb": float(b @ b),
        "dd": float(d @ d),
        "md": float(move @ d),
        "mm": float(move @ move),
        "rest": float((m - claim) @ (m - claim)),
        "cd": float((rounded(claim) - p * b) @ d),
        "clear": int(clear.sum()),
        "clear_md": float(move[clear] @ d[clear]),
        "moved_dd": float((d[m != rounded(b)] ** 2).sum()),
    }


def _step(size: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return float(max(2.0 ** math.floor(math.log2(size)) * info.eps if size else 0.0, info.smallest_normal * info.eps))


@example(kind=(torch.bfloat16, "BF16"), size=1.0, change=1e-06, weights=(0.9, 0.125), seed=0)  # torch rounds twice
@given(
    kind=st.sampled_from([(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")]),
    size=st.floats(1e-6, 1),
    change=st.floats(1e-6, 1),
    weights=st.tuples(st.sampled_from([1.0, 0.9]), st.floats(0.1, 2)),
    seed=st.integers(0, 1000),
)
def test_sums_are_those_of_the_formulas(
    kind: tuple[torch.dtype, str], size: float, change: float, weights: tuple[float, float], seed: int
) -> None:
    dtype, code = kind
    draw = np.random.default_rng(seed)
    p, q = weights
    b = torch.from_numpy(draw.normal(size=300) * size).to(dtype).float().numpy()
    d = (draw.normal(size=300) * change * size).astype(np.float32)
    m = torch.from_numpy(p * b + q * d).to(dtype).float().numpy()
    found = measure(b, d, m, p, q, code)
    for name, value in naive(b, d, m, p, q, dtype).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-30), name
    assert found.beyond == 0
    halves = measure(b[:100], d[:100], m[:100], p, q, code) + measure(b[100:], d[100:], m[100:], p, q, code)
    for name in ("count", "as_base", "visible", "dd", "md", "rest", "worst"):
        assert getattr(halves, name) == pytest.approx(getattr(found, name), rel=1e-9, abs=1e-30), name
    assert Sums() + found == found


@pytest.mark.parametrize("seed", range(20))
def test_rounding_of_a_float32_product_is_no_other_factor(seed: int) -> None:
    """Its squares are 1e-15 of the change's, which sums in float64 lose if they are subtracted from each other."""
    draw = np.random.default_rng(seed)
    b = (draw.normal(size=4096) * 0.02).astype(np.float32)
    d = draw.normal(size=4096).astype(np.float32) * np.float32(30)
    error = draw.normal(size=4096) * 30 * 2.0**-25
    error[:1], d[:1] = 30 * 2.0**-20, 1e-3  # an element near zero that was summed from large ones
    m = (b + (d + error)).astype(np.float32)
    found = measure(b, d, m, 1, 1, "F32")
    assert found.beyond
    assert state_of(found, 1, 1) == "as claimed"
    assert state_of(measure(b, d, (b + 0.996 * d).astype(np.float32), 1, 1, "F32"), 1, 1) == "scaled"
