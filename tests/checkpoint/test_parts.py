"""Models of several parts: weights beside a model or an adapter, and in its sub-folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import reference
from checkpoints import State, files_of, random_state, same_bits, write_model
from mergekit_imm import (
    CheckpointError,
    MergeError,
    MismatchError,
    iter_merged,
    merge_checkpoints,
    merge_into,
    merged_stream,
    verify,
)
from mergekit_imm.plan.describe import check
from refused import shown_options

Shapes = dict[str, tuple[int, ...]]
ROOT: Shapes = {"embeddings.word_embeddings.weight": (40, 16), "encoder.layer.0.output.weight": (16, 64)}
DENSE: Shapes = {"linear.weight": (8, 16), "linear.bias": (8,)}
HEAD: Shapes = {"v_head.summary.weight": (1, 64)}
CONFIG = {"model_type": "bert", "tie_word_embeddings": False, "dtype": "bfloat16"}


def write_parts(folder: Path, seed: int, *, head: bool = True, root: str = "", dense: str = "model") -> State:
    """Write a model, a module in a sub-folder and a head beside it; return all tensors by path in the model."""
    states = [random_state(shapes, seed=seed + i) for i, shapes in enumerate((ROOT, DENSE, HEAD))]
    write_model(folder / root, states[0], config=CONFIG)
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": root}, {"idx": 2, "path": "2_Dense"}]))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 16, "out_features": 8}')
    if dense.endswith(".bin"):
        torch.save(states[1], folder / "2_Dense" / dense)
    else:
        save_file(states[1], folder / "2_Dense" / f"{dense}.safetensors", {"format": "pt"})
    if head:
        save_file(states[2], folder / "value_head.safetensors", {"format": "pt"})
    prefix = f"{root}/" if root else ""
    return (
        {prefix + name: tensor for name, tensor in states[0].items()}
        | {f"2_Dense/{name}": tensor for name, tensor in states[1].items()}
        | (states[2] if head else {})
    )


def read_parts(folder: Path) -> State:
    """All tensors of all safetensors files, by path in the model."""
    state: State = {}
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.parent.relative_to(folder).as_posix()
        state |= {f"{place}/{name}" if place != "." else name: tensor for name, tensor in load_file(file).items()}
    return state


def merged_by_formula(base: State, sft: State, drop: float, start: State | None = None, iteration: int = 0) -> State:
    begin = start or base
    return {
        name: reference.merge_tensors(
            tensor, sft[name], begin[name], tensor.dtype, name=name, alpha=0.5, drop=drop, iteration=iteration
        )
        for name, tensor in base.items()
    }


def assert_equal(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@pytest.mark.parametrize("root", ["", "0_Transformer"])
@pytest.mark.parametrize("dense", ["model", "pytorch_model.bin", "weights"])
def test_all_parts_are_merged_and_their_masks_keyed_by_the_path(tmp_path: Path, root: str, dense: str) -> None:
    base = write_parts(tmp_path / "base", 1, root=root, dense=dense)
    sft = write_parts(tmp_path / "sft", 11, root=root)
    out = tmp_path / "out"
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", out, drop=0.5)
    expected = merged_by_formula(base, sft, 0.5)
    assert_equal(read_parts(out), expected)
    names = {"model": "model", "pytorch_model.bin": "model", "weights": "weights"}
    own = f"{root}/model.safetensors" if root else "model.safetensors"
    assert sorted(report.files) == sorted([own, f"2_Dense/{names[dense]}.safetensors", "value_head.safetensors"])
    assert (out / "2_Dense" / "config.json").read_bytes() == (tmp_path / "base/2_Dense/config.json").read_bytes()
    assert json.loads((out / root / "config.json").read_text()) == CONFIG
    assert verify(out).of_segments == len(expected)
    streamed = dict(iter_merged(tmp_path / "base", tmp_path / "sft", drop=0.5))
    assert_equal(streamed, expected)


def test_a_next_round_knows_parts(tmp_path: Path) -> None:
    base, one = write_parts(tmp_path / "base", 1), write_parts(tmp_path / "one", 11)
    merge_checkpoints(tmp_path / "base", tmp_path / "one", tmp_path / "m1", drop=0.5)
    two = write_parts(tmp_path / "two", 21)
    report = merge_checkpoints(tmp_path / "base", tmp_path / "two", tmp_path / "m2", start=tmp_path / "m1", drop=0.5)
    assert report.parameters["iteration"] == 1
    start = merged_by_formula(base, one, 0.5)
    assert_equal(read_parts(tmp_path / "m2"), merged_by_formula(base, two, 0.5, start, 1))


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_in_a_sub_folder_and_their_index(tmp_path: Path, stem: str) -> None:
    """Components of a pipeline as diffusers stores them, none at the top level."""
    base, sft = (random_state(ROOT, seed=seed) for seed in (1, 2))
    for role, state in (("base", base), ("sft", sft)):
        folder = tmp_path / role / "unet"
        folder.mkdir(parents=True)
        (tmp_path / role / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
        (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        names = {name: f"{stem}-{n:05}-of-00002.safetensors" for n, name in enumerate(state, 1)}
        if role == "base":
            for name, file in names.items():
                save_file({name: state[name]}, folder / file, {"format": "pt"})
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        else:
            save_file(state, folder / f"{stem}.safetensors", {"format": "pt"})
    expected = merged_by_formula(
        {f"unet/{name}": t for name, t in base.items()}, {f"unet/{name}": t for name, t in sft.items()}, 0.5
    )
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    merge_checkpoints(tmp_path / "sft", tmp_path / "base", tmp_path / "one", drop=0.5)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "cut", drop=0.5, max_shard_size="1500B")
    assert_equal(read_parts(tmp_path / "out"), expected)
    assert_equal(read_parts(tmp_path / "cut"), expected)
    assert (tmp_path / "one" / "unet" / f"{stem}.safetensors").is_file()
    for out in ("out", "cut"):
        index = json.loads((tmp_path / out / "unet" / f"{stem}.safetensors.index.json").read_text())
        files = sorted((tmp_path / out / "unet").glob("*.safetensors"))
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        assert json.loads((tmp_path / out / "unet" / "config.json").read_text())["_class_name"]


def save_pt(state: State, file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)


@pytest.mark.parametrize("name", ["vit.safetensors", "non_lora_state_dict.bin", "mm_projector.pt"])
def test_trained_weights_beside_a_model_are_its_own(tmp_path: Path, name: str) -> None:
    """An sft with some of the base's tensors in a separate file."""
    base, sft = random_state(ROOT, seed=1), random_state(ROOT, seed=2)
    last = [*ROOT][-1]
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "sft", {key: tensor for key, tensor in sft.items() if key != last})
    save_pt({last: sft[last]}, tmp_path / "sft" / name)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert_equal(read_parts(tmp_path / "out"), merged_by_formula(base, sft, 0.5))
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_head_beside_pytorch_files_is_not_taken_for_the_model(tmp_path: Path) -> None:
    base, sft = random_state(ROOT, seed=1), random_state(ROOT, seed=2)
    heads = {"base": random_state(HEAD, seed=3), "sft": random_state(HEAD, seed=4)}
    for role, state in (("base", base), ("sft", sft)):
        (tmp_path / role).mkdir()
        torch.save(state, tmp_path / role / "pytorch_model.bin")
        save_file(heads[role], tmp_path / role / "value_head.safetensors")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert_equal(read_parts(tmp_path / "out"), merged_by_formula(base | heads["base"], sft | heads["sft"], 0.5))


Cure = Callable[[Path], dict[str, list[str]]]


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin", "2_Dense/model.safetensors"])
def test_a_file_that_matches_nothing_is_refused_with_options_that_work(tmp_path: Path, name: str) -> None:
    base, sft, more = random_state(ROOT, seed=1), random_state(ROOT, seed=2), random_state(HEAD, seed=3)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "sft", sft)
    (tmp_path / "sft" / name).parent.mkdir(exist_ok=True)
    save_pt(more, tmp_path / "sft" / name)
    out = tmp_path / "out"
    with pytest.raises(MismatchError, match="1 tensor is in sft") as refusal:
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", out)
    assert f"({name})" in refusal.value.args[0]
    assert refusal.value.args[0].endswith(f"or leave the file out: --leave-out '{name}'")
    assert not out.exists()
    (option,) = shown_options(refusal.value.args[0])
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", out, take=option["take"])
    prefix = f"{Path(name).parent}/" if "/" in name else ""
    expected = merged_by_formula(base, sft, 0.2) | {f"{prefix}{key}": tensor for key, tensor in more.items()}
    assert_equal(read_parts(out), expected)
    assert (out / name).with_suffix(".safetensors").is_file()  # where a loader looks
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "without", leave_out=[name])
    assert_equal(read_parts(tmp_path / "without"), merged_by_formula(base, sft, 0.2))
    assert name in report.left_out["sft"]
    verify(tmp_path / "without")


def test_a_part_that_only_the_base_has(tmp_path: Path) -> None:
    base = write_parts(tmp_path / "base", 1)
    sft = random_state(ROOT, seed=5)
    write_model(tmp_path / "sft", sft, config=CONFIG)
    found = check(tmp_path / "base", tmp_path / "sft")
    assert len(found.problems) == 2
    # The base's modules.json names 2_Dense: without its weights the result would not load.
    assert ["leave the file out" in problem for problem in found.problems] == [
        "2_Dense" not in p for p in found.problems
    ]
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", keep=["^2_Dense/", "^v_head"])
    kept = {name: tensor for name, tensor in base.items() if name not in sft}
    assert_equal(read_parts(tmp_path / "out"), merged_by_formula({n: base[n] for n in sft}, sft, 0.2) | kept)


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.bin",
        "training_args.bin",
        "rng_state_0.pth",
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.bin",
        "checkpoint-5/model.safetensors",
        "pytorch_model_fsdp_0/x.bin",
        "2_Dense/pytorch_model.bin",
    ],
)
def test_copies_and_the_state_of_a_training_are_no_parts(tmp_path: Path, name: str) -> None:
    base, sft = write_parts(tmp_path / "base", 1), write_parts(tmp_path / "sft", 11)
    path = tmp_path / "sft" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"anything")
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert_equal(read_parts(tmp_path / "out"), merged_by_formula(base, sft, 0.5))
    assert name in report.left_out["sft"]


def test_a_file_that_is_no_weights_can_be_left_out(tmp_path: Path) -> None:
    write_parts(tmp_path / "base", 1)
    write_parts(tmp_path / "sft", 11)
    (tmp_path / "sft" / "notes.pt").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match=r'leave it out: leave_out=\[r"notes\.pt"\]'):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", leave_out=["notes.pt"])
    with pytest.raises(MergeError, match="names no file of base"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "other", leave_out=["notes.pt", "note"])


def test_an_index_says_which_of_two_shards_a_tensor_is_read_from(tmp_path: Path) -> None:
    base, sft = random_state(ROOT, seed=1), random_state(ROOT, seed=2)
    one, two = ROOT
    write_model(tmp_path / "base", base)
    for named, stale in ((1, 2), (2, 1)):
        folder = write_model(tmp_path / f"sft{named}", sft, shards=[[one], [two]])
        places = {1: "model-00001-of-00002.safetensors", 2: "model-00002-of-00002.safetensors"}
        # The first tensor is in both files; the index names one.
        index = {"weight_map": {one: places[named], two: places[2]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        contents = {1: {one: sft[one]}, 2: {one: sft[one], two: sft[two]}}
        contents[stale][one] = torch.zeros_like(sft[one])
        for number, content in contents.items():
            save_file(content, folder / places[number])
        report = merge_checkpoints(tmp_path / "base", folder, tmp_path / f"out{named}", drop=0)
        assert_equal(read_parts(tmp_path / f"out{named}"), merged_by_formula(base, sft, 0))
        (note,) = report.notes
        assert "stores 1 tensors twice" in note


def test_an_interrupted_merge_of_parts_goes_on(tmp_path: Path) -> None:
    base, sft = write_parts(tmp_path / "base", 1), write_parts(tmp_path / "sft", 11)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5, progress=stop, workers=1)
    assert (tmp_path / "out.partial").is_dir()
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert_equal(read_parts(tmp_path / "out"), merged_by_formula(base, sft, 0.5))
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "whole", drop=0.5)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


class Numbered(nn.Module):
    """A live model of sentence-transformers: numbered modules, the first holds a model."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            inside = name.removeprefix("2_Dense/")
            *path, last = (f"2.{inside}" if inside != name else f"0.model.{name}").split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(tensor.clone()))


@pytest.mark.parametrize("root", ["", "0_Transformer"])
def test_a_model_of_numbered_modules_is_merged_in_memory(tmp_path: Path, root: str) -> None:
    base = write_parts(tmp_path / "base", 1, root=root, head=False)
    sft = write_parts(tmp_path / "sft", 11, root=root, head=False)
    prefix = f"{root}/" if root else ""
    model = Numbered({name.removeprefix(prefix): tensor for name, tensor in sft.items()})
    expected = merged_by_formula(base, sft, 0.5)
    streamed = dict(merged_stream(model.state_dict().items(), tmp_path / "base", drop=0.5))
    assert streamed.keys() == expected.keys()
    assert all(same_bits(streamed[name], tensor) for name, tensor in expected.items())
    assert merge_into(model, tmp_path / "base", drop=0.5).tensors == {"merged": len(base)}
    found = model.state_dict()
    for name, tensor in expected.items():
        inside = name.removeprefix("2_Dense/")
        live = f"2.{inside}" if inside != name else f"0.model.{name.removeprefix(prefix)}"
        assert same_bits(found[live], tensor)


def test_an_adapter_in_a_sub_folder_is_no_part_and_is_said(tmp_path: Path) -> None:
    base, sft = write_parts(tmp_path / "base", 1), write_parts(tmp_path / "sft", 11)
    folder = tmp_path / "sft" / "lora_adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert_equal(read_parts(tmp_path / "out"), merged_by_formula(base, sft, 0.5))
    assert [note for note in report.notes if "holds an adapter in lora_adapter/" in note]


def test_a_list_of_modules_alone_is_no_model(tmp_path: Path) -> None:
    write_parts(tmp_path / "base", 1)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "modules.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"sft .* holds no "):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
