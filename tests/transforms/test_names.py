"""Models with other tensor names than the base, written by transformers and torch: matched and merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from checkpoints import State, random_state, read_model, same_bits, write_model
from mergekit_imm import ArgumentError, MismatchError, dare_merge, merge_checkpoints, verify
from mergekit_imm.model.rename_rules import by_prefix
from models import fine_tuned, load, new_model, save

IN_MEMORY = {"save_original_format": False}  # makes transformers 5 write the names in memory


def assert_same(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not same_bits(one[name], other[name])] == []


@pytest.mark.parametrize("layout", ["qwen3_moe", "deepseek_v3", "gemma3", "qwen2_5_vl", "llama4"])
def test_names_in_memory_are_those_of_the_files(layout: str, tmp_path: Path) -> None:
    model = new_model(layout)
    base = save(model, tmp_path / "base", "base", "20KB")
    tuned = fine_tuned(model, seed=2)
    tuned.save_pretrained(tmp_path / "files")
    tuned.save_pretrained(tmp_path / "memory", **IN_MEMORY)
    differ = set(read_model(tmp_path / "memory")) - set(read_model(base))
    assert bool(differ) == (layout != "llama4")
    options: dict[str, Any] = {"alpha": 0.3, "drop": 0.5, "seed": 3}
    merge_checkpoints(base, tmp_path / "files", tmp_path / "one", **options)
    report = merge_checkpoints(base, tmp_path / "memory", tmp_path / "other", workers=3, verify=True, **options)
    assert_same(read_model(tmp_path / "one"), read_model(tmp_path / "other"))
    assert sum(rule["tensors"] for rule in report.renamed) == len(
        set(read_model(base)) - set(read_model(tmp_path / "memory"))
    )
    assert bool(report.notes) == bool(differ)
    assert all(note.isprintable() for note in report.notes)
    verify(tmp_path / "other")
    load(tmp_path / "other", layout)


@pytest.mark.parametrize("layout", ["qwen3_moe", "deepseek_v3", "gemma3"])
def test_a_base_may_have_the_names_in_memory(layout: str, tmp_path: Path) -> None:
    """Single experts are fused: the result equals that of the same base in its file layout, saved by transformers."""
    model = new_model(layout)
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base in memory", **IN_MEMORY)
    fine_tuned(model, seed=2).save_pretrained(tmp_path / "sft")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "one", drop=0)
    merge_checkpoints(tmp_path / "base in memory", tmp_path / "sft", tmp_path / "other", drop=0, workers=3)
    assert sorted(read_model(tmp_path / "other")) == sorted(read_model(tmp_path / "base in memory"))
    one, other = (load(tmp_path / name, layout).state_dict() for name in ("one", "other"))
    assert_same(one, other)


def test_names_that_differ_behind_the_number_of_a_layer(tmp_path: Path) -> None:
    """Mixtral's `mlp` in memory is `block_sparse_moe` in files, for adapters too."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3)
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tuned = fine_tuned(model, seed=2)
    tuned.save_pretrained(tmp_path / "files")
    tuned.save_pretrained(tmp_path / "memory", **IN_MEMORY)
    for sft in ("files", "memory"):
        merge_checkpoints(tmp_path / "base", tmp_path / sft, tmp_path / f"{sft} merged", drop=0.5)
    assert_same(*(read_model(tmp_path / f"{sft} merged") for sft in ("files", "memory")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        wrapped = peft.get_peft_model(model.float(), peft.LoraConfig(r=2, target_modules=[], target_parameters=experts))
        for parameter in wrapped.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
        wrapped.save_pretrained(tmp_path / "adapter")
        wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=0, drop=0, dtype="float32")
    theirs = read_model(tmp_path / "theirs")
    for name, tensor in read_model(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-6, atol=2e-7)


def test_a_start_with_other_names(tmp_path: Path) -> None:
    model = new_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    start, sft = fine_tuned(model, seed=2), fine_tuned(model, seed=3)
    for name, each in (("start", start), ("sft", sft)):
        each.save_pretrained(tmp_path / name)
        each.save_pretrained(tmp_path / f"{name} in memory", **IN_MEMORY)
    for names in (("start", "sft in memory"), ("start in memory", "sft"), ("start in memory", "sft in memory")):
        out = tmp_path / "-".join(names)
        merge_checkpoints(tmp_path / "base", tmp_path / names[1], out, start=tmp_path / names[0], iteration=1, drop=0.5)
        states = (read_model(tmp_path / name) for name in ("base", "sft"))
        expected = dare_merge(*states, start=read_model(tmp_path / "start"), iteration=1, drop=0.5)
        assert_same(read_model(out), expected)


@pytest.mark.parametrize("bare", ["base", "sft"])
def test_a_model_saved_without_its_head_s_class(bare: str, tmp_path: Path) -> None:
    """GPT-2 on the hub lacks the `transformer.` that its causal LM writes; its tied head may be stored."""
    model = new_model("gpt2")
    state = {"base": model, "sft": fine_tuned(model, seed=2)}
    config = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    config = {key: value for key, value in config.items() if isinstance(value, str | int | float | list | bool)}
    for role, each in state.items():
        inner = each.transformer if role == bare else each
        tensors = {n: t for n, t in inner.state_dict().items() if n != "lm_head.weight"}
        if role != bare:
            tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        write_model(tmp_path / role, tensors, config=config)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5, alpha=0.3)
    base = read_model(tmp_path / "base")
    prefix = {"base": "", "sft": "transformer."}[bare]
    sft = {f"{prefix}{n}": t for n, t in state["sft"].transformer.state_dict().items()}
    sft |= {"lm_head.weight": sft["transformer.wte.weight"]} if "lm_head.weight" in base else {}
    expected = dare_merge(
        {n: t for n, t in base.items() if n != "lm_head.weight"},
        {n: t for n, t in sft.items() if n != "lm_head.weight"},
        drop=0.5,
        alpha=0.3,
    )
    merged = read_model(tmp_path / "out")
    assert_same({n: t for n, t in merged.items() if n != "lm_head.weight"}, expected)
    load(tmp_path / "out", "gpt2")


def test_the_text_part_of_a_wrapped_model(tmp_path: Path) -> None:
    """Its language model was tuned alone, as another class; --keep keeps the rest, the config is the base's."""
    model = new_model("gemma3")
    save(model, tmp_path / "base", "base")
    text = transformers.Gemma3ForCausalLM(model.config.text_config).to(torch.bfloat16)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.tie_weights()
    fine_tuned(text, seed=2).save_pretrained(tmp_path / "sft")
    with pytest.raises(MismatchError, match=r"34 tensors are in base .* only, .*: keep=") as refused:
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert "vision_tower" in str(refused.value)
    keep = ["^vision_tower", "^multi_modal_projector"]
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", keep=keep, drop=0.5)
    base, sft, merged = (read_model(tmp_path / name) for name in ("base", "sft", "out"))
    tuned = {f"language_model.{name}": tensor for name, tensor in sft.items() if name != "lm_head.weight"}
    assert set(tuned) == {name for name in base if name.startswith("language_model.")}
    expected = {n: t for n, t in base.items() if n not in tuned} | dare_merge(
        {n: base[n] for n in tuned}, tuned, drop=0.5
    )
    assert_same(merged, expected)
    assert report.tensors["kept"] == 34
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    load(tmp_path / "out", "gemma3")


def test_wrappers_are_no_part_of_a_name(tmp_path: Path) -> None:
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    tuned = fine_tuned(model, seed=2)
    tuned.save_pretrained(tmp_path / "plain")
    merge_checkpoints(tmp_path / "base", tmp_path / "plain", tmp_path / "expected", drop=0.5)
    layer = type(tuned.model.layers[0].mlp)
    apply_activation_checkpointing(tuned, check_fn=lambda module: isinstance(module, layer))
    tuned.model.layers[1] = torch.compile(tuned.model.layers[1], backend="eager")
    state = {f"module.{name}": tensor for name, tensor in tuned.named_parameters()}  # as DDP names them
    assert {"_orig_mod", "_checkpoint_wrapped_module"} <= {part for name in state for part in name.split(".")}
    write_model(tmp_path / "sft", state)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert_same(read_model(tmp_path / "out"), read_model(tmp_path / "expected"))


def test_rules_for_an_adapter_are_about_what_it_changes(tmp_path: Path) -> None:
    """Rules see the names in messages: of weights, not factors, without the prefix of PEFT."""
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    changed = {"q_proj": "seek", "model.lm_head": "model.top"}
    state = load_file(path)
    for old, new in changed.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    save_file(state, path)
    given = tmp_path / "base", tmp_path / "adapter"
    with pytest.raises(
        MismatchError, match=r"only, not in base .*'model\.layers\.\*\.self_attn\.seek.*'top\.weight'.*use rename"
    ):
        merge_checkpoints(*given, tmp_path / "out")
    head = r"^top\.weight$=lm_head.weight"
    report = merge_checkpoints(
        *given, tmp_path / "out", rename=[r"^model\.(.*)\.seek\.weight$=model.\1.q_proj.weight", head]
    )
    assert sum(each["tensors"] for each in report.renamed) == 3
    verify(tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"changes none of the 3 tensor names .* such as '[mt]"):
        merge_checkpoints(*given, tmp_path / "no", rename=["lora_A=lora_B"])
    with pytest.raises(MismatchError, match=r"layers\.0.* and '.*layers\.1.* would become '.*layers\.0.*change rename"):
        merge_checkpoints(*given, tmp_path / "no", rename=[r"layers\.\d+\.(.*)seek=layers.0.\1q_proj", head])


SHAPES = {"model.embed.weight": (8, 4), "model.layers.0.a.w": (4, 4), "model.layers.1.a.w": (4, 4)}


def pair(folder: Path, names: dict[str, str], extra: State | None = None) -> tuple[State, State]:
    base = random_state(SHAPES)
    sft = random_state(SHAPES, seed=1)
    write_model(folder / "base", base)
    write_model(folder / "sft", {names.get(name, name): tensor for name, tensor in sft.items()} | (extra or {}))
    return base, sft


def test_rules_of_the_user_come_first(tmp_path: Path) -> None:
    names = {"model.layers.0.a.w": "blocks.one.w", "model.layers.1.a.w": "blocks.two.w"}
    base, sft = pair(tmp_path, names)
    with pytest.raises(MismatchError, match="2 tensors are in base"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    rename = [r"^blocks\.one\.=model.layers.0.a.", r"^blocks\.(t)wo\.=model.layers.1.a."]
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", rename=rename, drop=0.5)
    assert_same(read_model(tmp_path / "out"), dare_merge(base, sft, drop=0.5))
    assert [(each["name"], each["in_base"], each["tensors"]) for each in report.renamed] == [
        ("blocks.one.*", "model.layers.*.a.*", 1),
        ("blocks.two.*", "model.layers.*.a.*", 1),
    ]
    verify(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--rename '^blocks\\.one\\.=model.layers.0.a.'" in card


@pytest.mark.parametrize(
    ("rename", "error", "match"),
    [
        (["nothing=x"], ArgumentError, "changes none of the 3 tensor names of sft and start, such as 'model.e"),
        (["no rule"], ArgumentError, "'no rule' is not understood: write it as REGEX=REPLACEMENT"),
        (["(=x"], ArgumentError, "is not understood"),
        ([r"a=\2"], ArgumentError, "is not understood: invalid group reference"),
        ("a=b", ArgumentError, "rename is a string"),
        ([r"layers\.\d=layers.0"], MismatchError, "two tensors of sft .* would become 'model.layers.0.a.w' of base"),
        ([r"layers\.1=layers.2"], MismatchError, r"'model.layers.1.a.w' \(closest there: 'model.layers.2.a.w'\)"),
    ],
)
def test_rules_that_lead_nowhere(tmp_path: Path, rename: Any, error: type[Exception], match: str) -> None:
    pair(tmp_path, {})
    with pytest.raises(error, match=match):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", rename=rename)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "sft"]


def test_names_that_have_nothing_in_common_may_be_of_one_tensor(tmp_path: Path) -> None:
    """Each side has one extra tensor: --keep would drop what was trained."""
    for role, head in (("base", "read_out.weight"), ("sft", "lm_head.weight")):
        write_model(tmp_path / role, random_state({"embed_in.weight": (8, 4), head: (8, 4)}, seed=len(role)))
    given = tmp_path / "base", tmp_path / "sft"
    with pytest.raises(MismatchError, match=r"'read_out\.weight'.* if they are the same, rename=") as told:
        merge_checkpoints(*given, tmp_path / "out")
    assert "'^" not in str(told.value)
    merge_checkpoints(*given, tmp_path / "out", rename=["^lm_head=read_out"])


def test_what_two_prefixes_could_mean_is_not_guessed(tmp_path: Path) -> None:
    towers = {f"{tower}.layers.{i}.w": (4, 4) for tower in ("one", "two") for i in range(2)}
    base = random_state(towers)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "sft", random_state({"model.layers.0.w": (4, 4), "model.layers.1.w": (4, 4)}))
    with pytest.raises(MismatchError, match="4 tensors are in base"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    rename = ["^model=one"]
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", rename=rename, keep=["^two"])
    assert report.tensors["kept"] == 2


@pytest.mark.parametrize("stored", ["both", "head", "embedding"])
def test_a_tied_head_goes_where_its_embedding_does(tmp_path: Path, stored: str) -> None:
    """A trainer prefixed all names with `wrapped.`; the base stores the embedding only."""
    config = {"tie_word_embeddings": True}
    shapes = {"model.embed_tokens.weight": (8, 4), "model.layers.0.a.w": (4, 4), "model.layers.1.a.w": (4, 4)}
    base, sft = random_state(shapes), random_state(shapes, seed=1)
    expected = dare_merge(base, sft, drop=0.5)
    sft["lm_head.weight"] = sft["model.embed_tokens.weight"].clone()
    for name in {"head": ["model.embed_tokens.weight"], "embedding": ["lm_head.weight"]}.get(stored, []):
        del sft[name]
    write_model(tmp_path / "base", base, config=config)
    write_model(tmp_path / "sft", {f"wrapped.{name}": tensor for name, tensor in sft.items()}, config=config)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert_same(read_model(tmp_path / "out"), expected)


# --- the matching itself


def test_numbers_are_those_of_the_other_name() -> None:
    """An extra layer is not matched to another stack."""
    lost = {"model.layers.2.w.x": (4,)}
    assert by_prefix(lost, {"mtp.layers.0.w.x": (4,)}) == {}
    assert by_prefix(lost, {"mtp.layers.2.w.x": (4,)}) == {"model.layers.2.w.x": "mtp.layers.2.w.x"}
    here = {f"layers.{n}.mlp.{w}.weight": (4,) for n in range(3) for w in ("gate", "experts.1.up")}
    there = {name.replace("mlp", "block.moe"): (4,) for name in here}
    assert by_prefix(here, there) == dict(zip(here, there, strict=True))
    del there["layers.1.block.moe.gate.weight"]
    assert by_prefix(here, there) == {}
    two = there | {name.replace("block.moe", "moe"): (4,) for name in there}
    assert by_prefix({"layers.0.mlp.gate.weight": (4,)}, two) == {}
    assert by_prefix({"a.*.x.w": (4,), "a.1.x.w": (4,)}, {"b.1.x.w": (4,), "b.*.x.w": (4,)}) == {"a.1.x.w": "b.1.x.w"}


def test_a_prefix_takes_all_names_or_none() -> None:
    lost = {"a.x.w": (4,), "a.y.w": (4,)}
    assert by_prefix(lost, {"b.x.w": (4,)}) == {}
    assert by_prefix(lost, {"b.x.w": (4,), "b.y.w": (5,)}) == {}
    assert by_prefix(lost, {"b.x.w": (4,), "c.y.w": (4,)}) == {}
    assert by_prefix(lost, {"b.x.w": (4,), "b.y.w": (4,)}) == {"a.x.w": "b.x.w", "a.y.w": "b.y.w"}


def test_one_word_is_not_enough() -> None:
    assert by_prefix({"score.weight": (8, 4)}, {"lm_head.weight": (8, 4)}) == {}


_PART = st.sampled_from(["model", "layers", "0", "1", "attn", "mlp", "norm", "weight", "language_model", "x", "*"])
_NAME = st.lists(_PART, min_size=2, max_size=6).map(".".join)


@given(
    st.dictionaries(_NAME, st.just((4,)), max_size=12), st.dictionaries(_NAME, st.just((4,)), max_size=12), st.randoms()
)
def test_a_match_is_one_to_one_and_depends_on_no_order(lost: Any, free: Any, random: Any) -> None:
    lost = {name: shape for name, shape in lost.items() if name not in free}
    found = by_prefix(lost, free)
    assert set(found) <= set(lost)
    assert set(found.values()) <= set(free)
    assert len({*found.values()}) == len(found)
    for old, new in found.items():
        assert [part for part in old.split(".") if part.isdigit()] == [
            part for part in new.split(".") if part.isdigit()
        ]
    shuffled = []
    for each in (lost, free):
        items = list(each.items())
        random.shuffle(items)
        shuffled.append(dict(items))
    assert by_prefix(*shuffled) == found
