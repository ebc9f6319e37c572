"""Experts: transposed or not, with and without gates, fused or single."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import State, random_state, read_model, same_bits, write_model
from mergekit_imm import MismatchError, dare_merge, merge_checkpoints, merge_into, merged_stream, verify
from mergekit_imm.checkpoint.lazy_tensor import sliced, transposed
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.checkpoint.reader import Files
from mergekit_imm.live.local_shards import Live, Part, held
from models import fine_tuned
from modules import values_of

FUSED = ("experts.gate_up_proj", "experts.down_proj")


def assert_same(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not same_bits(one[name], other[name])] == []


def turned(state: State) -> State:
    return {n: t.transpose(1, 2).contiguous() if n.endswith(FUSED) else t for n, t in state.items()}


# --- stored transposed


def vl_moe(inner: int) -> Any:
    """A small Qwen3-VL-MoE; one of the experts' tensors is square if `inner` is 16 or 32."""
    config = transformers.AutoConfig.for_model(
        "qwen3_vl_moe",
        text_config={
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": inner,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "depth": 1,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 8,
            "deepstack_visual_indexes": [0],
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)


@pytest.mark.parametrize("inner", [24, 16, 32])
@pytest.mark.parametrize("role", ["base", "sft", "start"])
def test_one_of_the_models_has_them_the_other_way_round(inner: int, role: str, tmp_path: Path) -> None:
    """The hub has [experts, in, out], transformers 5 saves [experts, out, in]; the result follows the base."""
    model = vl_moe(inner)
    states: dict[str, State] = {}
    for seed, name in enumerate(("base", "start", "sft")):
        fine_tuned(model, seed).save_pretrained(tmp_path / name)
        states[name] = read_model(tmp_path / name)
    write_model(tmp_path / role, turned(states[role]))
    here = {name: turned(state) if role == "base" else state for name, state in states.items()}
    options: dict[str, Any] = {"alpha": 0.3, "drop": 0.5, "seed": 3, "iteration": 1}
    out = tmp_path / "out"
    report = merge_checkpoints(
        tmp_path / "base", tmp_path / "sft", out, start=tmp_path / "start", workers=3, verify=True, **options
    )
    expected = dare_merge(here["base"], here["sft"], start=here["start"], **options)
    assert_same(read_model(out), expected)
    lines = [note for note in report.notes if "stored transposed" in note]
    assert len(lines) == (2 if role == "base" else 1)
    assert all("4 tensors of experts" in line for line in lines)
    verify(out)


def test_transformers_reads_what_was_merged(tmp_path: Path) -> None:
    base, sft = vl_moe(24).float(), fine_tuned(vl_moe(24).float(), 2)
    for name, model in (("base", base), ("sft", sft)):
        model.save_pretrained(tmp_path / name)
    write_model(tmp_path / "base", turned(read_model(tmp_path / "base")))
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0)
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(merged[name], (tensor + sft.state_dict()[name]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", [24, 16])
def test_a_model_in_memory_has_them_the_other_way_round(inner: int, tmp_path: Path) -> None:
    model = vl_moe(inner)
    model.save_pretrained(tmp_path / "base")
    sft = fine_tuned(model, 2)
    sft.save_pretrained(tmp_path / "sft")
    write_model(tmp_path / "base", turned(read_model(tmp_path / "base")))
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    for names in (sorted(sft.state_dict()), sorted(sft.state_dict(), reverse=True)):
        stream = ((name, sft.state_dict()[name]) for name in names)
        assert_same(dict(merged_stream(stream, tmp_path / "base", drop=0.5)), read_model(tmp_path / "out"))
    merge_into(sft, tmp_path / "base", drop=0.5)
    sft.save_pretrained(tmp_path / "live")
    assert_same(turned(read_model(tmp_path / "live")), read_model(tmp_path / "out"))


SIZES = {"gate_up_proj": (4, 24, 8), "down_proj": (4, 8, 12)}
PATH = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("inner", [12, 4, 8])
@pytest.mark.parametrize("way", ["base one by one", "sft one by one"])
def test_they_are_cut_and_joined_the_right_way_round(inner: int, way: str, tmp_path: Path) -> None:
    """One model has single experts [out, in], the other fused ones [experts, in, out]."""
    fused = {f"{PATH}.gate_up_proj": (4, 2 * inner, 8), f"{PATH}.down_proj": (4, 8, inner)}
    one, other = random_state(fused, seed=1), random_state(fused, seed=2)

    def single(state: State) -> State:
        gate_up, down = state.values()
        return {
            f"{PATH}.{e}.{end}.weight": part.clone()
            for e in range(4)
            for end, part in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up[e].chunk(2), down[e]), strict=True)
        }

    shapes = {"base one by one": (single(one), turned(other)), "sft one by one": (turned(one), single(other))}
    write_model(tmp_path / "base", shapes[way][0])
    write_model(tmp_path / "sft", shapes[way][1])
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    expected = dare_merge(*(single(s) if way == "base one by one" else turned(s) for s in (one, other)), drop=0.5)
    assert_same(read_model(tmp_path / "out"), expected)


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    """A square tensor without its partner, which would settle the orientation."""
    shapes = {f"{PATH}.gate_up_proj": (4, 16, 16), f"{PATH}.down_proj": (4, 16, 8), "model.norm.weight": (16,)}
    base, sft = random_state(shapes), random_state(shapes, seed=1)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "sft", {n: t for n, t in sft.items() if "down" not in n})
    with pytest.raises(MismatchError, match=r"'.*gate_up_proj' of sft .* is square, .* save both"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", keep=["down"])


def test_half_of_the_experts_is_never_advised(tmp_path: Path) -> None:
    shapes = {f"{PATH}.{name}": shape for name, shape in SIZES.items()} | {"model.norm.weight": (8,)}
    base = random_state(shapes)
    write_model(tmp_path / "base", base)
    half = {n: t for n, t in random_state(shapes, seed=1).items() if "down" not in n}
    larger = random_state(shapes | {f"{PATH}.down_proj": (5, 8, 12), f"{PATH}.gate_up_proj": (5, 24, 8)}, seed=2)
    for state, match in ((half, "1 tensor is in base"), (larger, "different architectures")):
        write_model(tmp_path / "sft", state)
        with pytest.raises(MismatchError, match=match) as caught:
            merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
        assert "--keep" not in str(caught.value)
        assert "--take" not in str(caught.value)
    write_model(tmp_path / "base", half)
    write_model(tmp_path / "sft", base)
    with pytest.raises(MismatchError, match="1 tensor is in sft") as caught:
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert "--take" not in str(caught.value)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.int8]),
    data=st.data(),
)
def test_any_range_is_that_of_the_transposed(
    shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stored = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    checkpoint = open_checkpoint(write_model(tmp_path_factory.mktemp("turned"), {"w": stored}), "base")
    flat = stored.transpose(1, 2).contiguous().reshape(-1).view(torch.uint8).numpy()
    width = stored.element_size()
    tensor = transposed(checkpoint.tensors["w"], "base")
    assert tensor.shape == (shape[0], shape[2], shape[1])
    count = stored.numel()
    edges = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=4))})
    low = data.draw(st.integers(0, count - 1))
    part = sliced(tensor, "base", "part", low, (count - low,))
    again = transposed(tensor, "base")
    with Files({"base": checkpoint}) as files:

        def read(each: Any, first: int, end: int) -> bytes:
            out = np.full((end - first) * width, 0xEE, np.uint8)
            files.read("base", each, first * width, out)
            return out.tobytes()

        for first, end in pairwise(edges):
            assert read(tensor, first, end) == flat[first * width : end * width].tobytes()
        assert read(part, 0, count - low) == flat[low * width :].tobytes()
        assert read(again, 0, count) == stored.reshape(-1).view(torch.uint8).numpy().tobytes()


# --- without gates


def nemotron_h() -> Any:
    config = transformers.NemotronHConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        n_group=1,
        topk_group=1,
        layers_block_type=["moe", "attention"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.NemotronHForCausalLM(config)


@pytest.mark.parametrize("base_in_memory", [False, True])
def test_experts_without_gates_are_cut_and_joined(base_in_memory: bool, tmp_path: Path) -> None:
    model = nemotron_h()
    sft = fine_tuned(model, 2)
    model.save_pretrained(tmp_path / "base", save_original_format=not base_in_memory)
    for name, original in (("files", True), ("memory", False)):
        sft.save_pretrained(tmp_path / name, save_original_format=original)
    ends = ("experts.up_proj", "experts.down_proj") if base_in_memory else ("experts.3.up_proj.weight",)
    assert all(any(name.endswith(end) for name in read_model(tmp_path / "base")) for end in ends)
    for name in ("files", "memory"):
        merge_checkpoints(tmp_path / "base", tmp_path / name, tmp_path / f"{name} merged", drop=0.5, workers=3)
    assert_same(*(read_model(tmp_path / f"{name} merged") for name in ("files", "memory")))
    own = {name: read_model(tmp_path / name) for name in ("base", "memory" if base_in_memory else "files")}
    assert_same(read_model(tmp_path / "files merged"), dare_merge(*own.values(), drop=0.5))


ADAPTED = {
    "nemotron_h": (nemotron_h, ["mixer.experts.up_proj", "mixer.experts.down_proj"]),
    "granitemoe": (
        lambda: transformers.GraniteMoeForCausalLM(
            transformers.GraniteMoeConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                num_experts_per_tok=2,
            )
        ),
        ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"],
    ),
}


@pytest.mark.parametrize("base_in_memory", [False, True])
@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_of_experts_is_what_peft_merges(kind: str, base_in_memory: bool, tmp_path: Path) -> None:
    """Its factors are for the tensors in memory, whatever their names and layout in the base's files."""
    make, targets = ADAPTED[kind]
    model = make()
    model.save_pretrained(tmp_path / "base", save_original_format=not base_in_memory)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
        for parameter in wrapped.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
        wrapped.save_pretrained(tmp_path / "adapter")
        wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs", save_original_format=not base_in_memory)
    merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=0, drop=0, verify=True)
    base, theirs = read_model(tmp_path / "base"), read_model(tmp_path / "theirs")
    merged = read_model(tmp_path / "out")
    assert sum(not torch.equal(merged[name], tensor) for name, tensor in base.items()) >= 2
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-6, atol=2e-7)


def test_a_part_of_a_tensor_in_memory_is_a_part_of_the_transposed() -> None:
    """A rank holds some rows of each matrix, which are columns in the base."""
    whole = torch.arange(120).reshape(4, 6, 5).float()
    parts = (Part(whole[:, 1:3].clone(), (0, 1, 0)), Part(whole[2:, 4:].clone(), (2, 4, 0)))
    live = transposed(Live("w", (4, 6, 5), "F32", parts, "somewhere"), "sft")
    flat = whole.transpose(1, 2).flatten().tolist()
    found = [each for part in held(live, 0, live.count) for each in values_of(part).items()]
    assert all(flat[index] == value for index, value in found)
    assert len(dict(found)) == len(found) == sum(part.tensor.numel() for part in parts)
