"""A model merged in memory has the weights that a merge of its checkpoint writes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpoints import State, random_state, read_model, same_bits, write_model
from mergekit_imm import (
    ArgumentError,
    CheckpointError,
    MismatchError,
    PartialMergeError,
    merge_checkpoints,
    merge_into,
)
from models import LAYOUTS, fine_tuned, load, new_model, untied
from modules import BASE, OPTIONS, SFT, Model, assert_is, fresh, naive, put, refused, state_of, write_models


def assert_holds(model: nn.Module, expected: State) -> None:
    """Compare in float32, which holds every dtype that transformers may load."""
    assert_is(model.float(), expected)


# --- live equals streamed, with the names and fused tensors of transformers


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_live_is_streamed(layout: str, tmp_path: Path) -> None:
    base = new_model(layout)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    fine_tuned(base, seed=5).save_pretrained(tmp_path / "start")
    options: dict[str, Any] = {
        "alpha": 0.3,
        "drop": 0.5,
        "seed": 3,
        "no_drop": ["norm|ln_"],
        "keep": [r"\.1\..*(norm|ln_)"],
    }
    if layout in ("llama", "qwen3_moe", "deepseek_v3", "mamba"):
        options |= {"importance": {"0": 1.0, "1": 3.0}}
    for dtype in (None, torch.float32):
        live = fine_tuned(base, seed=2, dtype=dtype)
        live.save_pretrained(tmp_path / f"sft {dtype}")
        started: dict[str, Any] = {} if dtype is None else {"start": tmp_path / "start", "iteration": 4}
        sft, out = tmp_path / f"sft {dtype}", tmp_path / f"out {dtype}"
        name = None if dtype is None else "float32"
        report = merge_checkpoints(tmp_path / "base", sft, out, dtype=name, **started, **options)
        live_report = merge_into(live, tmp_path / "base", **started, **options)
        assert live_report.tensors == {kind: count for kind, count in report.tensors.items() if count}
        assert bool(live_report.notes) == (layout in ("qwen3_moe", "deepseek_v3", "gemma3", "qwen2_5_vl"))
        assert_holds(live, load(out, layout, dtype=torch.float32).state_dict())


@pytest.mark.parametrize("layout", ["qwen3_moe", "gemma3"])
def test_parameters_of_several_dtypes(layout: str, tmp_path: Path) -> None:
    """Each keeps its own: norms float32, as trainers keep them, the rest bfloat16."""
    base = new_model(layout)
    base.save_pretrained(tmp_path / "base")
    live = fine_tuned(base, seed=2)
    for name, parameter in live.named_parameters():
        parameter.data = parameter.data.float() if "norm" in name else parameter.data
    live.save_pretrained(tmp_path / "sft")
    states = []
    for dtype in ("bfloat16", "float32"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / dtype, dtype=dtype, drop=0.5)
        states.append(load(tmp_path / dtype, layout, dtype="auto").state_dict())
    merge_into(live, tmp_path / "base", drop=0.5)
    assert_is(live, {name: states["norm" in name][name] for name in states[0]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and start on disk."""
    return write_models(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def expected() -> State:
    """The expected weights of the model."""
    return naive(SFT)


@pytest.mark.parametrize(("step", "workers"), [(2 << 20, 1), (8192, 3)])
def test_live_is_what_the_formulas_say(folder: Path, expected: State, step: int, workers: int) -> None:
    model = fresh()
    where = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    seen: list[tuple[int, int]] = []
    with patch("mergekit_imm.live.in_place.STEP", step):
        merge_into(
            model,
            folder / "base",
            start=folder / "start",
            workers=workers,
            **OPTIONS,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert_is(model, expected)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == where
    size = sum(tensor.nbytes for tensor in SFT.values())
    assert seen == sorted(seen)
    assert seen[-1] == (2 * size, 2 * size)


def test_memory_of_any_strides(folder: Path, expected: State) -> None:
    def turned(name: str, tensor: Tensor) -> Tensor:
        room = torch.zeros([2 * size + 1 for size in reversed(tensor.shape)], dtype=tensor.dtype)
        view = room[tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
        return view.copy_(tensor)

    model = put(fresh(), turned)
    assert not any(parameter.is_contiguous() for parameter in model.parameters() if parameter.numel() > 2)
    with patch("mergekit_imm.live.in_place.STEP", 8192):
        merge_into(model, folder / "base", start=folder / "start", **OPTIONS)
    assert_is(model, expected)


def test_a_start_that_is_the_base_and_a_reference(folder: Path) -> None:
    cases: list[dict[str, Any]] = [{"start": folder / "base"}, {"start": folder / "start", "reference": "base"}]
    for options in cases:
        model = fresh()
        merge_into(model, folder / "base", **options, **OPTIONS)
        assert_is(model, naive(SFT, start=False))


def test_the_round_is_that_of_the_start(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"start .* has no imm_recipe.json with its round"):
        merge_into(fresh(), folder / "base", start=folder / "start")
    merge_checkpoints(folder / "base", folder / "start", tmp_path / "round", iteration=4)
    models = fresh(), fresh()
    report = merge_into(models[0], folder / "base", start=tmp_path / "round")
    merge_into(models[1], folder / "base", start=tmp_path / "round", iteration=5)
    assert report.iteration == 5
    assert_is(models[0], state_of(models[1]))


def test_integers_are_compared_and_kept_ones_are_the_base_s(tmp_path: Path) -> None:
    base = {**BASE, "steps": torch.arange(5)}
    write_model(tmp_path / "base", base)
    model = fresh({**SFT, "steps": torch.arange(5)})
    merge_into(model, tmp_path / "base", keep=["norm"], take=["embed"], drop=0.5)
    assert same_bits(model.state_dict()["norm.w"], BASE["norm.w"].float())
    assert same_bits(model.state_dict()["embed_tokens.weight"], SFT["embed_tokens.weight"])
    other = fresh({**SFT, "steps": torch.tensor([0, 1, 2, 4, 4])})
    before = state_of(other)
    with pytest.raises(MismatchError, match=r"'steps' is I64 and not merged, but it differs at element 3"):
        merge_into(other, tmp_path / "base")
    assert_is(other, before)
    merge_into(other, tmp_path / "base", keep=["steps"])
    assert same_bits(other.state_dict()["steps"], base["steps"])


# --- ties


@pytest.mark.parametrize("stored", ["one", "both"])
@pytest.mark.parametrize("live", ["tied", "shared", "equal", "apart"])
def test_ties_are_those_of_files(stored: str, live: str, tmp_path: Path) -> None:
    base = new_model("qwen2")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = {"tie_word_embeddings": True, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    head = {"lm_head.weight"} if stored == "one" else set()
    write_model(tmp_path / "base", {n: t for n, t in state.items() if n not in head}, config=config)
    model = fine_tuned(base, seed=2) if live == "tied" else untied(base, seed=2)
    if live == "shared":
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    if live == "equal":
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    saved = {n: t for n, t in state_of(model).items() if live != "tied" or n != "lm_head.weight"}
    write_model(tmp_path / "sft", saved, config=config)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    expected = read_model(tmp_path / "out")
    if live == "apart":
        assert not same_bits(expected["lm_head.weight"], expected["model.embed_tokens.weight"])
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])
    merge_into(model, tmp_path / "base", drop=0.5)
    assert_is(model, expected)


@pytest.mark.parametrize("stored", ["a.w", "b.w"])
def test_a_tensor_of_two_names_may_be_stored_under_either(stored: str, tmp_path: Path) -> None:
    base, sft = random_state({"a.w": (30, 40)}), random_state({"a.w": (30, 40)}, seed=1)
    write_model(tmp_path / "base", {stored: base["a.w"]})
    write_model(tmp_path / "sft", {stored: sft["a.w"]})
    model = Model({"a.w": sft["a.w"].clone(), "b.w": sft["a.w"]})
    model.get_submodule("b").w = model.get_parameter("a.w")
    merge_into(model, tmp_path / "base", drop=0.5)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert_is(model, dict.fromkeys(("a.w", "b.w"), read_model(tmp_path / "out")[stored]))


def test_one_tensor_that_is_two_in_the_base(tmp_path: Path) -> None:
    model = fine_tuned(new_model("qwen2"), seed=2)
    apart = untied(model, seed=3)
    apart.save_pretrained(tmp_path / "base")
    match = "'lm_head.weight' and 'model.embed_tokens.weight' are one tensor in sft model Qwen2.*, but the base has two"
    refused(model, tmp_path / "base", match)


# --- wrapped and other models


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_wrapped_models(folder: Path, tmp_path: Path) -> None:
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(fine_tuned(model, seed=2), peft.LoraConfig(target_modules=["q_proj"]))
    refused(adapted, tmp_path / "base", r"wrapped by PEFT \(\w+\): merge the adapter first, `merge_and_unload\(\)`")
    merge_into(adapted.merge_and_unload(), tmp_path / "base")

    merged = fine_tuned(model, seed=2)
    merge_into(merged, tmp_path / "base")
    compiled: Any = torch.compile(fine_tuned(model, seed=2), backend="eager")
    merge_into(compiled, tmp_path / "base")
    assert_is(compiled, {f"_orig_mod.{name}": tensor for name, tensor in state_of(merged).items()})


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of a single rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:.*")
def test_wrappers_of_distributed_training(folder: Path, expected: State) -> None:
    replicated = nn.parallel.DistributedDataParallel(fresh())
    merge_into(replicated, folder / "base", start=folder / "start", **OPTIONS)
    assert_is(replicated, {f"module.{name}": tensor for name, tensor in expected.items()})
    with pytest.raises(MismatchError, match=r"FullyShardedDataParallel \(FSDP1\): its flat parameters cannot"):
        merge_into(
            FullyShardedDataParallel(Model({"w": torch.ones(4)}), device_id=torch.device("cpu")), folder / "base"
        )


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mistral"'))
    refused(model, tmp_path / "base", "has model_type mistral, sft model LlamaForCausalLM has llama; they must be one")


def test_a_base_that_is_not_there(folder: Path) -> None:
    refused(fresh(), folder / "nowhere", "base .*nowhere does not exist", CheckpointError)
    refused(fresh(), folder / "base", "alpha is 2; it is the weight", ArgumentError, alpha=2)
    refused(fresh(), folder / "base", "keep is a string", ArgumentError, keep="norm")


# --- failures midway


@pytest.mark.parametrize("late", [False, True])
def test_a_base_that_is_cut_off_on_the_way(late: bool, tmp_path: Path) -> None:
    shapes = {f"h.{i}.w": (600, 700) for i in range(8)}
    base = write_model(tmp_path / "base", random_state(shapes))
    model = fresh(random_state(shapes, seed=1))

    def cut(done: int, total: int) -> None:
        if done > total * (0.6 if late else 0.1):
            os.truncate(base / "model.safetensors", 4096)

    if not late:
        refused(model, base, "was changed or cut off|was written or removed", CheckpointError, progress=cut)
        return
    match = "failed after parts of the model were written: .*; load the model again, from its last checkpoint"
    with pytest.raises(PartialMergeError, match=match) as caught:
        merge_into(model, base, progress=cut)
    assert isinstance(caught.value.__cause__, CheckpointError)


def test_a_base_that_is_written_meanwhile(folder: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE)

    def touch(done: int, total: int) -> None:
        if 2 * done >= total:
            os.utime(base / "model.safetensors", ns=(1, 1))

    refused(fresh(), base, "was written or removed during the merge", CheckpointError, progress=touch)


def test_memory_is_that_of_the_model(tmp_path: Path) -> None:
    """With four workers the peak is some MB above the model; a second copy would take 1 GB."""
    write_model(tmp_path / "base", {"h.0.w": torch.zeros(250_000_000, dtype=torch.bfloat16)})
    write_model(tmp_path / "small", {"w": torch.zeros(4096, dtype=torch.bfloat16)})
    script = f"""
        import re, sys, torch
        from pathlib import Path
        from mergekit_imm import merge_into
        from modules import Model
        merge_into(Model({{"w": torch.ones(4096)}}), {str(tmp_path / "small")!r})
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
        model = Model({{"h.0.w": torch.ones(250_000_000)}})
        before = peak()
        merge_into(model, {str(tmp_path / "base")!r}, workers=4)
        assert before > 10**9
        print(peak() - before)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parents[1] / "support",
        capture_output=True,
        text=True,
        check=False,
    )
    (tmp_path / "base" / "model.safetensors").unlink()
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 150e6
