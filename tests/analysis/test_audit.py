"""Right merges by PEFT and others are as claimed; what cannot be told, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from adapters import KINDS, train
from audited import LINEAR, Case, states, summed
from checkpoints import State, random_state, write_model
from end_to_end import zoo
from mergekit_imm import ArgumentError, CheckpointError, audit
from merges import peft_merge, rewritten, write_adapter, write_base
from models import LAYOUTS
from thorough import others


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
