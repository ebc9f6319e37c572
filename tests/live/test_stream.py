"""A stream of tensors is merged to what a merge of the saved model writes."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from checkpoints import State, random_state, read_model, same_bits, write_model
from fp8 import write_fp8
from mergekit_imm import ArgumentError, CheckpointError, MismatchError, merge_checkpoints, merged_stream
from models import LAYOUTS, fine_tuned, new_model, untied
from modules import BASE, OPTIONS, SFT, naive, write_models


def collected(stream: Iterable[tuple[str, Tensor]]) -> State:
    """Return what a stream yields; no name twice."""
    found: State = {}
    for name, tensor in stream:
        assert name not in found
        found[name] = tensor
    return found


def assert_same(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def one_buffer(state: State) -> Iterator[tuple[str, Tensor]]:
    """Give tensors as a hook does that gathers each into the same memory; what was yielded is overwritten."""
    room = torch.empty(max(tensor.nbytes for tensor in state.values()), dtype=torch.uint8)
    for name, tensor in state.items():
        view = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        yield name, view
        room.fill_(0xA5)


def shuffled(state: State, seed: int) -> State:
    names = random.Random(seed).sample(sorted(state), len(state))
    return {name: state[name] for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and start on disk."""
    return write_models(tmp_path_factory.mktemp("stream"))


def test_stream_is_what_the_formulas_say(folder: Path) -> None:
    merged = merged_stream(one_buffer(SFT), folder / "base", start=folder / "start", **OPTIONS)
    assert_same(collected(merged), naive(SFT))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_streamed_is_saved(layout: str, tmp_path: Path) -> None:
    """With the names and the fused tensors of transformers, in any order, from one buffer."""
    base = new_model(layout)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    live = fine_tuned(base, seed=2)
    live.save_pretrained(tmp_path / "sft")
    options: dict[str, Any] = {"alpha": 0.3, "drop": 0.5, "seed": 3, "no_drop": ["norm|ln_"]}
    options["keep"] = [r"\.1\..*(norm|ln_)"]
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", **options)
    expected = read_model(tmp_path / "out")
    for seed in range(4):
        state = shuffled(dict(live.state_dict()), seed)
        assert_same(collected(merged_stream(one_buffer(state), tmp_path / "base", **options)), expected)
    persistent = [(name, buffer) for name, buffer in live.named_buffers() if name in live.state_dict()]
    named = [*live.named_parameters(), *persistent]  # a tied tensor once
    assert_same(collected(merged_stream(named, tmp_path / "base", **options)), expected)


def test_any_devices_strides_and_gradients(folder: Path) -> None:
    """The given tensors stay as they are, and share no memory with what is yielded."""
    state = {}
    for name, tensor in SFT.items():
        room = torch.zeros([2 * size + 1 for size in reversed(tensor.shape)], dtype=tensor.dtype)
        view = room[tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
        state[name] = view.copy_(tensor).requires_grad_()
    merged = collected(merged_stream(state.items(), folder / "base", start=folder / "start", workers=3, **OPTIONS))
    assert_same(merged, naive(SFT))
    assert all(same_bits(state[name].detach(), tensor) for name, tensor in SFT.items())
    assert {t.untyped_storage().data_ptr() for t in merged.values()}.isdisjoint(
        t.untyped_storage().data_ptr() for t in state.values()
    )
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_in_inference_mode(folder: Path) -> None:
    with torch.inference_mode():
        state = {name: tensor.clone() for name, tensor in SFT.items()}
        inside = collected(merged_stream(state.items(), folder / "base", start=folder / "start", **OPTIONS))
    outside = collected(merged_stream(state.items(), folder / "base", start=folder / "start", **OPTIONS))
    for merged in (inside, outside):
        assert_same({name: tensor.clone() for name, tensor in merged.items()}, naive(SFT))


@given(st.permutations(sorted(SFT)), st.sampled_from(["", "module.", "_orig_mod.", "module._fsdp_wrapped_module."]))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_and_wrapper(folder: Path, order: list[str], wrapper: str) -> None:
    stream = one_buffer({wrapper + name: SFT[name] for name in order})
    merged = collected(merged_stream(stream, folder / "base", start=folder / "start", **OPTIONS))
    assert list(merged) == order or "embed_tokens.weight" in merged
    assert_same(merged, naive(SFT))


# --- what one stores in one tensor, and the other in several


@pytest.mark.parametrize("stored", ["fused", "apart"])
@pytest.mark.parametrize("seed", range(3))
def test_experts(stored: str, seed: int, tmp_path: Path) -> None:
    """The gate_up_proj of this model is square: which way it lies is known from the other stack alone."""
    model = new_model("qwen3_moe")
    fused = [dict(each.state_dict()) for each in (model, fine_tuned(model, seed=2))]
    apart = []
    for number, each in enumerate((model, fine_tuned(model, seed=2))):
        each.save_pretrained(tmp_path / f"{number}")
        apart.append(read_model(tmp_path / f"{number}"))
    base, stream = (fused[0], apart[1]) if stored == "fused" else (apart[0], fused[1])
    write_model(tmp_path / "base", base)
    sft = write_model(tmp_path / "sft", (fused if stored == "fused" else apart)[1])  # as the base: nothing to match
    merge_checkpoints(tmp_path / "base", sft, tmp_path / "out", drop=0.5)
    merged = collected(merged_stream(one_buffer(shuffled(stream, seed)), tmp_path / "base", drop=0.5))
    assert_same(merged, read_model(tmp_path / "out"))


def projections(seed: int) -> tuple[State, State]:
    """Two layers with query, key and value apart, and as one tensor."""
    shapes = {
        f"model.layers.{layer}.self_attn.{part}_proj.{end}": (8, 6) if end == "weight" else (8,)
        for layer in range(2)
        for part in "qkv"
        for end in ("weight", "bias")
    }
    apart = random_state(shapes, seed=seed)
    fused = {}
    for layer in range(2):
        for end in ("weight", "bias"):
            path = f"model.layers.{layer}.self_attn"
            fused[f"{path}.qkv_proj.{end}"] = torch.cat([apart[f"{path}.{part}_proj.{end}"] for part in "qkv"])
    rest = random_state({"model.norm.weight": (6,)}, seed=seed)
    return apart | rest, fused | rest


@pytest.mark.parametrize("stored", [0, 1])
def test_fused_projections(stored: int, tmp_path: Path) -> None:
    bases, sfts = projections(0), projections(1)
    write_model(tmp_path / "base", bases[stored])
    expected = {
        name: reference.merge_tensors(bases[stored][name], tensor, None, tensor.dtype, **OPTIONS, name=name)
        for name, tensor in sfts[stored].items()
    }
    for seed in range(3):
        stream = one_buffer(shuffled(sfts[1 - stored], seed))
        assert_same(collected(merged_stream(stream, tmp_path / "base", **OPTIONS)), expected)


def test_what_is_complete_comes_at_once(tmp_path: Path) -> None:
    """Of fused tensors no more waits than what the next needs."""
    bases, sfts = projections(0), projections(1)
    write_model(tmp_path / "base", bases[1])
    taken: list[str] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in sorted(sfts[0].items()):
            taken.append(name)
            yield name, tensor

    seen = [(name, len(taken)) for name, _ in merged_stream(stream(), tmp_path / "base")]
    wanted = [
        (f"model.layers.{layer}.self_attn.qkv_proj.{end}", 6 * layer + 5 + number)
        for layer in range(2)
        for number, end in enumerate(("bias", "weight"))
    ]
    assert seen == [*wanted, ("model.norm.weight", 13)]


def test_rules_of_the_user(folder: Path, tmp_path: Path) -> None:
    stream = {f"net.{name.replace('h.', 'block_')}": tensor for name, tensor in SFT.items()}
    rename = ["^net[.]=", "^block_=h."]
    merged = merged_stream(stream.items(), folder / "base", start=folder / "start", rename=rename, **OPTIONS)
    assert_same(collected(merged), naive(SFT))


# --- ties


@pytest.mark.parametrize("stored", ["one", "both"])
@pytest.mark.parametrize("gives", ["one", "equal", "apart", "head alone"])
@pytest.mark.parametrize("first", ["embedding", "head"])
def test_ties_are_those_of_files(stored: str, gives: str, first: str, tmp_path: Path) -> None:
    base = new_model("qwen2")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = {"tie_word_embeddings": True, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    absent = {"lm_head.weight"} if stored == "one" else set()
    write_model(tmp_path / "base", {n: t for n, t in state.items() if n not in absent}, config=config)
    sft = {name: tensor.clone() for name, tensor in fine_tuned(base, seed=2).state_dict().items()}
    if gives == "apart":
        sft["lm_head.weight"] += 0.01
    absent = {"one": {"lm_head.weight"}, "head alone": {"model.embed_tokens.weight"}}.get(gives, set())
    sft = {name: tensor for name, tensor in sft.items() if name not in absent}
    write_model(tmp_path / "sft", sft, config=config)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    ends = ["model.embed_tokens.weight", "lm_head.weight"]
    if first == "head":
        ends.reverse()
    order = sorted(sft, key=lambda name: ends.index(name) if name in ends else 2)
    stream = one_buffer({name: sft[name] for name in order})
    assert_same(collected(merged_stream(stream, tmp_path / "base", drop=0.5)), read_model(tmp_path / "out"))


@pytest.mark.parametrize("gives", ["one", "both"])
def test_a_start_that_has_a_head_of_its_own(gives: str, tmp_path: Path) -> None:
    base = new_model("qwen2")
    base.save_pretrained(tmp_path / "base")
    untied(base, seed=3).save_pretrained(tmp_path / "start")
    sft = fine_tuned(base, seed=2) if gives == "one" else untied(base, seed=2)
    sft.save_pretrained(tmp_path / "sft")
    options: dict[str, Any] = {"start": tmp_path / "start", "iteration": 1, "drop": 0.5}
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", **options)
    stream = one_buffer(read_model(tmp_path / "sft"))
    assert_same(collected(merged_stream(stream, tmp_path / "base", **options)), read_model(tmp_path / "out"))


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_head_that_only_the_start_and_the_stream_store(first: str, tmp_path: Path) -> None:
    """The base stores the embedding alone; the start has another head, and the stream gives it twice."""
    base = {"model.embed_tokens.weight": torch.ones(6, 4), "model.norm.weight": torch.ones(4)}
    ends = ["model.embed_tokens.weight", "lm_head.weight"]
    models = {"base": base}
    for number, role in enumerate(("start", "sft"), 1):
        table = random_state({ends[0]: (6, 4)}, seed=number)[ends[0]].float()
        models[role] = {**base, ends[0]: table, ends[1]: table + (0.5 if role == "start" else 0)}
    for role, state in models.items():
        write_model(tmp_path / role, state, config={"tie_word_embeddings": True} if role != "start" else None)
    options: dict[str, Any] = {"start": tmp_path / "start", "iteration": 1, "drop": 0.5}
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", **options)
    order = ends if first == "embedding" else ends[::-1]
    stream = one_buffer({name: models["sft"][name] for name in [*order, "model.norm.weight"]})
    assert_same(collected(merged_stream(stream, tmp_path / "base", **options)), read_model(tmp_path / "out"))


# --- kept and taken tensors, integers, the round


def test_kept_and_taken_tensors(folder: Path, tmp_path: Path) -> None:
    own = {**SFT, "value.weight": torch.ones(3), "norm.w": torch.ones(5)}
    del own["h.0.b"]
    options: dict[str, Any] = {"take": ["^value", "embed"], "keep": ["^norm", r"h\.0\.b"], **OPTIONS}
    merged = collected(merged_stream(own.items(), folder / "base", start=folder / "start", **options))
    expected = naive({name: SFT[name] for name in ("h.0.w", "h.1.w")})
    kept = {name: BASE[name] for name in ("norm.w", "h.0.b")}
    assert_same(merged, {**expected, **kept, **{name: own[name] for name in ("value.weight", "embed_tokens.weight")}})
    again = collected(merged_stream(SFT.items(), folder / "base", keep=["^norm"], **OPTIONS))
    assert same_bits(again["norm.w"], BASE["norm.w"].float())  # in the dtype that was given


def test_what_is_handed_on_unchanged_is_the_receiver_s_own(tmp_path: Path) -> None:
    """A buffer that comes next does not change it, nor does the receiver change the model that it is from."""
    write_model(tmp_path / "base", {**BASE, "steps": torch.arange(5)})
    own = {"steps": torch.arange(5), "value.weight": torch.ones(3), **SFT}
    options: dict[str, Any] = {"take": ["^value", "embed"]}
    merged = collected(merged_stream(one_buffer(own), tmp_path / "base", **options))
    names = ("steps", "value.weight", "embed_tokens.weight")
    assert_same({name: merged[name] for name in names}, {name: own[name] for name in names})
    for _, tensor in merged_stream(own.items(), tmp_path / "base", **options):
        tensor.zero_()
    assert all(own[name].any() for name in names)


def test_integers_are_compared(tmp_path: Path) -> None:
    steps = torch.arange(5)
    write_model(tmp_path / "base", {**BASE, "steps": steps})
    merged = collected(merged_stream({**SFT, "steps": steps.clone()}.items(), tmp_path / "base", **OPTIONS))
    assert_same(merged, {**naive(SFT, start=False), "steps": steps})
    stream = merged_stream({"steps": steps + (steps == 3)}.items(), tmp_path / "base")
    with pytest.raises(MismatchError, match="'steps' is I64 and not merged, but it differs at element 3 between base"):
        next(stream)


def test_the_round_is_that_of_the_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"start .* has no imm_recipe.json with its round"):
        merged_stream((), folder / "base", start=folder / "start")
    merge_checkpoints(folder / "base", folder / "start", tmp_path / "round", iteration=4)
    one, other = (
        collected(merged_stream(SFT.items(), folder / "base", start=tmp_path / "round", iteration=iteration))
        for iteration in (None, 5)
    )
    assert_same(one, other)


def test_importance_and_reference(tmp_path: Path) -> None:
    base = new_model("llama")
    base.save_pretrained(tmp_path / "base")
    sft = fine_tuned(base, seed=2)
    sft.save_pretrained(tmp_path / "sft")
    fine_tuned(base, seed=5).save_pretrained(tmp_path / "start")
    options: dict[str, Any] = {"start": tmp_path / "start", "iteration": 1, "importance": {"0": 1.0, "1": 3.0}}
    for reference_model in ("start", "base"):
        out = tmp_path / f"out {reference_model}"
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", out, reference=reference_model, **options)
        stream = sft.state_dict().items()
        merged = merged_stream(stream, tmp_path / "base", reference=reference_model, **options)
        assert_same(collected(merged), read_model(out))


# --- memory, files


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """A model of 1.2 GB in tensors of 50 MB goes through; a fused one that waits is held once more."""
    shapes = {f"h.{number}.w": (5000, 5000) for number in range(24)}
    write_model(tmp_path / "base", {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
    script = f"""
        import re, torch
        from pathlib import Path
        from mergekit_imm import merged_stream
        def stream(count):
            room = torch.ones(5000, 5000, dtype=torch.bfloat16)
            for number in range(count):
                yield f"h.{{number}}.w", room
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
        merged = merged_stream(stream(24), {str(tmp_path / "base")!r}, workers=2)
        next(merged)
        before = peak()
        for name, tensor in merged:
            del tensor
        print(peak() - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 120e6


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="shows open files on Linux")
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_receiver_that_stops_early_leaves_no_open_file(taken: int, folder: Path) -> None:
    merged: Any = merged_stream(SFT.items(), folder / "base", **OPTIONS)
    for _ in range(taken):
        next(merged)
    merged.close()
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert [link for link in links if folder in link.parents] == []


def test_a_base_in_fp8(tmp_path: Path) -> None:
    base = new_model("llama")
    base.save_pretrained(tmp_path / "source")
    write_fp8(tmp_path / "source", tmp_path / "base", (16, 16))
    sft = fine_tuned(base, seed=2)
    sft.save_pretrained(tmp_path / "sft")
    options: dict[str, Any] = {"drop": 0.5, "dequantize": True}
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", **options)
    stream = one_buffer(shuffled(dict(sft.state_dict()), 0))
    assert_same(collected(merged_stream(stream, tmp_path / "base", **options)), read_model(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"dequantize=True"):
        merged_stream(sft.state_dict().items(), tmp_path / "base")
