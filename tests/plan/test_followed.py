"""Follow the advice of a refusal: it leads to a model that loads and is right, or to a message without advice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from checkpoints import State, write_model
from followed import Inputs, endings, looks_right, offered, rewrite, told_in_advance
from models import fine_tuned, model_of

CAUSAL = transformers.AutoModelForCausalLM
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(**more: Any) -> Any:
    return model_of(transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **more}))


def moe(**more: Any) -> Any:
    sizes = {**SIZES, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return model_of(transformers.Qwen3MoeConfig(**{**sizes, "tie_word_embeddings": False, **more}))


def saved(folder: Path, base: Any, sft: Any | None = None, auto: Any = CAUSAL) -> Inputs:
    """Two models on disk; by default the sft is the base, changed."""
    base.save_pretrained(folder / "base")
    fine_tuned(base if sft is None else sft, seed=2).save_pretrained(folder / "sft")
    return Inputs(folder / "base", folder / "sft", auto)


def with_more(inputs: Inputs, role: str, more: Mapping[str, tuple[int, ...]], seed: int = 5) -> Inputs:
    """Add random tensors to one of the models."""
    generator = torch.Generator().manual_seed(seed)
    rewrite(getattr(inputs, role), lambda s: s | {n: torch.randn(*z, generator=generator) for n, z in more.items()})
    return inputs


def without(inputs: Inputs, role: str, pattern: str) -> Inputs:
    rewrite(getattr(inputs, role), lambda s: {n: t for n, t in s.items() if not re.search(pattern, n)})
    return inputs


def changed(inputs: Inputs, role: str, pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    rewrite(getattr(inputs, role), lambda s: {n: change(t) if re.search(pattern, n) else t for n, t in s.items()})
    return inputs


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = torch.nan
    return tensor


def each_layer(*ends: tuple[str, tuple[int, ...]], count: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{i}.{end}": shape for i in range(count) for end, shape in ends}


Q_NORM = each_layer(("self_attn.q_norm.weight", (8,)))
MTP: dict[str, tuple[int, ...]] = {
    f"model.layers.2.{end}": shape
    for end, shape in (("eh_proj.weight", (32, 64)), ("enorm.weight", (32,)), ("mlp.up_proj.weight", (48, 32)))
}
VISUAL = {f"visual.blocks.{i}.{n}.weight": (16, 16) for i in range(2) for n in ("qkv", "proj", "fc1", "fc2", "norm")}


def with_start(inputs: Inputs, change: Callable[[State], State]) -> Inputs:
    llama().save_pretrained(inputs.base.parent / "start")
    rewrite(inputs.base.parent / "start", change)
    return Inputs(inputs.base, inputs.sft, inputs.auto, inputs.base.parent / "start")


# What is refused, and the options that the first message offers, each alone; or what it says instead.
MERGED: dict[str, tuple[Callable[[Path], Inputs], list[str]]] = {
    "a norm in the sft": (
        lambda f: with_more(saved(f, llama()), "sft", Q_NORM),
        [r"--take ^model\.layers\.\d+\.self_attn\.q_norm\.weight$"],
    ),
    "a norm in the base": (
        lambda f: with_more(saved(f, llama()), "base", Q_NORM),
        [r"--keep ^model\.layers\.\d+\.self_attn\.q_norm\.weight$"],
    ),
    "in one layer of each kind": (
        lambda f: with_more(saved(f, llama()), "base", {**Q_NORM, "model.layers.1.self_attn.k_norm.weight": (8,)}),
        [r"--keep ^model\.layers\.\d+\.self_attn\.q_norm\.weight$|^model\.layers\.1\.self_attn\.k_norm\.weight$"],
    ),
    "rotary buffers in the base": (
        lambda f: with_more(saved(f, llama()), "base", each_layer(("self_attn.rotary_emb.inv_freq", (4,)))),
        [r"--keep ^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"],
    ),
    "rotary buffers in the sft": (
        lambda f: with_more(saved(f, llama()), "sft", each_layer(("self_attn.rotary_emb.inv_freq", (4,)))),
        [r"--take ^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"],
    ),
    "layers that predict more tokens, beyond those that are counted": (
        lambda f: with_more(saved(f, llama(num_nextn_predict_layers=1)), "base", MTP),
        [
            r"--keep ^model\.layers\.2\.eh_proj\.weight$|^model\.layers\.2\.enorm\.weight$"
            r"|^model\.layers\.2\.mlp\.up_proj\.weight$"
        ],
    ),
    "a part that predicts more tokens": (
        lambda f: with_more(saved(f, llama()), "base", {f"mtp.{n.removeprefix('model.')}": s for n, s in MTP.items()}),
        [
            r"--keep ^mtp\.layers\.2\.eh_proj\.weight$|^mtp\.layers\.2\.enorm\.weight$"
            r"|^mtp\.layers\.2\.mlp\.up_proj\.weight$"
        ],
    ),
    "a visual tower": (lambda f: with_more(saved(f, llama()), "base", VISUAL), [r"--keep ^visual\."]),
    "hundreds of one kind": (
        lambda f: with_more(saved(f, llama()), "base", {f"model.extra.{i}.gate": (2,) for i in range(300)}),
        [r"--keep ^model\.extra\.\d+\.gate$"],
    ),
    "hundreds of names without numbers of their own": (
        lambda f: with_more(saved(f, llama()), "base", {f"extra_{i}_gate_of_a_long_name": (2,) for i in range(300)}),
        [r"--keep ^extra_"],
    ),
    "names that a shell and a pattern read otherwise": (
        lambda f: with_more(saved(f, llama()), "sft", {"a.w(1)[2]+*?^$|{3}": (2,), 'it\'s "b" \\d': (2,)}),
        [r"""--take ^a\.w\(1\)\[2\]\+\*\?\^\$\|\{3\}$|^it's\ "b"\ \\d$"""],
    ),
    "a head that the sft lost": (lambda f: without(saved(f, llama()), "sft", "lm_head"), [r"--keep ^lm_head\.weight$"]),
    "a layer that the sft lost": (
        lambda f: without(saved(f, llama(num_hidden_layers=3)), "sft", r"layers\.1\."),
        [r"--keep ^model\.layers\.1\."],
    ),
    "NaN in one tensor of the sft": (
        lambda f: changed(saved(f, llama()), "sft", r"1\.mlp\.up_proj", nan),
        ["--allow-nonfinite", r"--keep ^model\.layers\.1\.mlp\.up_proj\.weight$"],
    ),
    "NaN in one tensor of the base": (
        lambda f: changed(saved(f, llama()), "base", r"1\.mlp\.up_proj", nan),
        ["--allow-nonfinite", r"--take ^model\.layers\.1\.mlp\.up_proj\.weight$"],
    ),
    "NaN in the head of an sft that unties": (
        lambda f: changed(saved(f, llama(tie_word_embeddings=True), llama()), "sft", "lm_head", nan),
        ["--allow-nonfinite", r"--keep ^lm_head\.weight$|^model\.embed_tokens\.weight$"],
    ),
    "NaN in a tied embedding": (
        lambda f: changed(saved(f, llama(tie_word_embeddings=True)), "sft", "embed", nan),
        ["--allow-nonfinite", r"--keep ^model\.embed_tokens\.weight$"],
    ),
    "NaN in one expert": (
        lambda f: changed(saved(f, moe()), "sft", r"layers\.1\..*experts\.2\.up_proj", nan),
        ["--allow-nonfinite", r"--keep ^model\.layers\.1\.mlp\.experts\.2\."],
    ),
    "one expert that the sft lost": (
        lambda f: without(saved(f, moe()), "sft", r"layers\.1\..*experts\.2\.up_proj"),
        [r"--keep ^model\.layers\.1\.mlp\.experts\.2\."],
    ),
    "integers that differ": (
        lambda f: _with_integers(saved(f, llama())),
        [r"--keep ^model\.steps$", r"--take ^model\.steps$"],
    ),
    "integers that are floats in the other": (
        lambda f: changed(_with_integers(saved(f, llama())), "sft", "steps", torch.Tensor.float),
        [r"--keep ^model\.steps$"],
    ),
    "a vocabulary that grew": (
        lambda f: saved(f, llama(), llama(vocab_size=70)),
        ["--vocab base", "--vocab sft"],
    ),
    "biases that the sft's config has, too": (
        lambda f: saved(f, llama(), llama(attention_bias=True)),
        [
            r"--take ^model\.layers\.\d+\.self_attn\.k_proj\.bias$|^model\.layers\.\d+\.self_attn\.o_proj\.bias$"
            r"|^model\.layers\.\d+\.self_attn\.q_proj\.bias$|^model\.layers\.\d+\.self_attn\.v_proj\.bias$"
        ],
    ),
    "a head that no config knows": (
        lambda f: with_more(saved(f, llama()), "sft", {"score.weight": (2, 32)}),
        [r"--take ^score\.weight$"],
    ),
    "one float8 tensor in the sft": (
        lambda f: changed(saved(f, llama()), "sft", r"1\.mlp\.up", lambda t: t.to(torch.float8_e4m3fn)),
        [r"--keep ^model\.layers\.1\.mlp\.up_proj\.weight$"],
    ),
    "one float8 tensor in the base": (
        lambda f: changed(saved(f, llama()), "base", r"1\.mlp\.up", lambda t: t.to(torch.float8_e4m3fn)),
        [r"--take ^model\.layers\.1\.mlp\.up_proj\.weight$"],
    ),
    "a start that lacks a tensor": (
        lambda f: with_start(saved(f, llama()), lambda s: {n: t for n, t in s.items() if n != "model.norm.weight"}),
        [r"--keep ^model\.norm\.weight$"],
    ),
    "a start that has more": (
        lambda f: with_start(saved(f, llama()), lambda s: s | {"extra": torch.ones(2)}),
        ["--reference base"],
    ),
}


def _with_integers(inputs: Inputs) -> Inputs:
    for role, number in (("base", 1), ("sft", 2)):
        rewrite(getattr(inputs, role), lambda s: s | {"model.steps": torch.full((3,), number)})  # noqa: B023
    return inputs


@pytest.mark.parametrize("case", MERGED)
def test_what_is_advised_leads_to_a_model_that_is_right(tmp_path: Path, case: str) -> None:
    make, options = MERGED[case]
    inputs = make(tmp_path)
    ends = list(endings(inputs, tmp_path))
    first = ends[0].messages[0]
    assert [" ".join(each[0]) for each in offered(first)] == options
    told_in_advance(inputs, first)
    for each in ends:
        assert each.out is not None, each.messages
        looks_right(inputs, each)


REFUSED: dict[str, tuple[Callable[[Path], Inputs], str]] = {
    "more layers in the base": (
        lambda f: saved(f, llama(num_hidden_layers=3), llama()),
        r"different depth are not merged: model\.layers has 3 layers in base \S+ and 2 in sft \S+ \(config\.json:"
        r" num_hidden_layers 3 and 2\); give the base that this sft was trained from",
    ),
    "more layers in the sft": (
        lambda f: saved(f, llama(), llama(num_hidden_layers=3)),
        r"model\.layers has 3 layers in sft \S+ and 2 in base \S+ \(config\.json: num_hidden_layers 3 and 2\)",
    ),
    "another layer in the sft that no config counts": (
        lambda f: with_more(saved(f, llama()), "sft", MTP),
        r"model\.layers has 3 layers in sft \S+ and 2 in base",
    ),
    "biases that the sft's config leaves out": (
        lambda f: saved(f, llama(attention_bias=True), llama()),
        r"8 tensors are in base .* the configs of base \S+ and sft \S+ differ \(attention_bias True and False\)",
    ),
    "another width": (
        lambda f: saved(f, llama(), llama(intermediate_size=64)),
        r"2 tensors 'model\.layers\.\*\.mlp\.\w+\.weight' are .* differ \(intermediate_size 48 and 64\)",
    ),
    "another number of experts": (
        lambda f: saved(f, moe(), moe(num_experts=6)),
        r"experts\.\*\.down_proj\.weight' \(4\).*num_(local_)?experts 4 and 6",
    ),
    "a matrix stored the other way round": (
        lambda f: changed(saved(f, llama()), "sft", "up_proj", torch.Tensor.t),
        r"2 tensors .*up_proj\.weight' are .* dimensions in another order; save both alike",
    ),
    "an sft that ties its head": (
        lambda f: saved(f, llama(), llama(tie_word_embeddings=True)),
        r"a config ties 'lm_head\.weight' and 'model\.embed_tokens\.weight'",
    ),
    "a start that has more, of an adapter": (
        lambda f: with_start(_adapter(f, "lm_head", (64, 32)), lambda s: s | {"extra": torch.ones(2)}),
        r"1 tensor is in start \S+ only, .*: save it again$",
    ),
    "all of a model but its embeddings": (
        lambda f: without(saved(f, llama()), "sft", r"layers|norm"),
        r"most of base \S+, 79% of its elements: give the base that this sft was trained from",
    ),
    "other names": (
        lambda f: _renamed(saved(f, llama())),
        r"other names: if they are the same, --rename REGEX=REPLACEMENT",
    ),
}


def _adapter(folder: Path, module: str, shape: tuple[int, int]) -> Inputs:
    llama().save_pretrained(folder / "base")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], "modules_to_save": [module]}
    write_model(folder / "sft", {}, side={"adapter_config.json": json.dumps(config)})
    (folder / "sft" / "model.safetensors").unlink()
    save_file({f"base_model.model.{module}.weight": torch.ones(shape)}, folder / "sft" / "adapter_model.safetensors")
    return Inputs(folder / "base", folder / "sft", CAUSAL)


def _renamed(inputs: Inputs) -> Inputs:
    rewrite(inputs.sft, lambda s: {n.replace("_proj.", "_linear."): t for n, t in s.items()})
    return inputs


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_cure_is_offered_none(tmp_path: Path, case: str) -> None:
    make, match = REFUSED[case]
    inputs = make(tmp_path)
    (end,) = endings(inputs, tmp_path)
    assert end.out is None
    assert end.options == ()
    assert re.search(match, end.messages[0]), end.messages[0]
    told_in_advance(inputs, end.messages[0])


def test_a_kind_of_tensors_is_one_problem(tmp_path: Path) -> None:
    inputs = saved(tmp_path, llama(), llama(intermediate_size=64))
    (end,) = endings(inputs, tmp_path)
    kinds = ("down_proj", "gate_proj", "up_proj")
    problems = told_in_advance(inputs, end.messages[0])
    assert [re.findall(r"^2 tensors 'model\.layers\.\*\.mlp\.(\w+)\.weight' are", each) for each in problems] == [
        [kind] for kind in kinds
    ]


def test_what_was_kept_already_counts_too(tmp_path: Path) -> None:
    """One pattern after another, most of a model would be kept."""
    inputs = saved(tmp_path, llama())
    for kind in ("up_proj", "gate_proj", "down_proj", "o_proj", "q_proj"):
        changed(inputs, "sft", kind, lambda t: t[..., None])
    ends = list(endings(inputs, tmp_path))
    assert [each.out for each in ends] == [None]
    assert len(ends[0].messages) > 2
    assert re.search(r"these are most of base \S+, 5\d% of its elements", ends[0].messages[-1])


def test_layers_that_the_config_does_not_count_are_not_kept(tmp_path: Path) -> None:
    inputs = saved(tmp_path, llama(num_hidden_layers=3), llama())
    for options in ((("--keep", "layers.2"),), (("--keep", "layers.2"), ("--keep", "layers.1"))):
        (end,) = endings(inputs, tmp_path, options)
        assert end.out is None
        assert re.search(r"--keep cannot reconcile two depths: .* num_hidden_layers 3 and 2", end.messages[0])
