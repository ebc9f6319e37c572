"""What is given is no model, or only a part of one: the message says what to give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import files_of, random_state, write_model
from mergekit_imm.errors import CheckpointError, MismatchError
from refused import (
    CONFIG,
    INDEX,
    MODEL,
    SHAPES,
    Models,
    sharded,
)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (
            {},
            r"sft \S+ holds no weights \(safetensors, pytorch_model\.bin or torch\.distributed\); give the folder that",
        ),
        ({"pytorch_model.bin": "x"}, r"pytorch_model\.bin is no whole file of torch\.save: .*download it again"),
        ({"model.bin": "x"}, r"PyTorch pickles; not supported: .*save_pretrained"),
        ({"consolidated.00.pth": "x"}, r"PyTorch pickles.*save_pretrained"),
        ({"model-q4.gguf": "x"}, r"GGUF.*use the original safetensors checkpoint"),
        ({"tf_model.h5": "x"}, r"TensorFlow, Flax or ONNX.*use the safetensors"),
        ({"flax_model.msgpack": "x"}, r"TensorFlow, Flax or ONNX"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": "x"}, r"not a whole safetensors file"),
        ({"adapter_config.json": "{}", "adapter_model.bin": "x"}, r"adapter_model\.bin is no whole file of torch"),
        ({".metadata": "x", "__0_0.distcp": "x"}, r"\.metadata holds a pickle that is damaged"),
        ({"__0_0.distcp": "x"}, r"a torch\.distributed checkpoint without its \.metadata"),
        ({"latest": "global_step5", "zero_to_fp32.py": "x"}, r"DeepSpeed.*zero_to_fp32\.py"),
        ({"one.safetensors": "x", "two.safetensors": "x"}, r"2 other.*one\.safetensors, two\.safetensors.*its path"),
    ],
)
def test_folders_without_a_model_are_refused_by_name(models: Models, files: dict[str, str], match: str) -> None:
    folder = models.folder / "given"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    models.refused(CheckpointError, match, sft=folder)


def test_one_of_several_safetensors_files_can_be_given_by_its_path(models: Models) -> None:
    models.sft.joinpath(MODEL).rename(models.sft / "one.safetensors")
    models.sft.joinpath("two.safetensors").write_bytes(b"x")
    message = models.refused(CheckpointError, "give the one to use by its path")
    assert "one.safetensors" in message
    assert models.merge(sft=models.sft / "one.safetensors").status == "merged"


def test_the_latest_of_a_trainers_checkpoints_is_named_by_its_number(models: Models) -> None:
    folder = models.folder / "run"
    for step in (9, 10, 2, 100):
        write_model(folder / f"checkpoint-{step}", random_state(SHAPES), config=CONFIG)
    message = models.refused(
        CheckpointError, r"no model at its top level, but 4 in sub-folders; .*checkpoint-100': give that", sft=folder
    )
    latest = next(word for word in re.split(r"[\s':]+", message) if word.endswith("checkpoint-100"))
    assert models.merge(sft=latest).status == "merged"


def test_other_latest_checkpoints_are_named_so_that_they_can_be_given(models: Models) -> None:
    for step in (20, 100):
        write_model(models.folder / "run" / f"checkpoint-{step}", random_state(SHAPES), config=CONFIG)
    message = models.refused(CheckpointError, "2 in sub-folders; the latest is", sft=models.folder / "run")
    assert models.merge(sft=after(message, "give that (or ")).status == "merged"


@pytest.mark.parametrize(
    "places",
    [
        ["base", "merged-0", "merged-1", "sft-0", "sft-2", "sft-10"],
        ["run-1/checkpoint-5", "run-1/checkpoint-10", "run-2/checkpoint-5"],
        ["a/final", "b/final"],
        ["epoch_2", "step_100"],
        ["checkpoint-5", "checkpoint-10", "merged"],
    ],
)
def test_models_that_are_not_of_one_training_are_listed_and_none_preferred(models: Models, places: list[str]) -> None:
    folder = models.folder / "models"
    for place in places:
        if place.startswith("merged"):
            models.merge(out=folder / place)
        else:
            write_model(folder / place, random_state(SHAPES), config=CONFIG)
    message = models.refused(
        CheckpointError, rf"holds no model at its top level, but {len(places)} in sub-folders: give one, '", sft=folder
    )
    listed = re.findall(r"'([^']+)'", message.partition("give one, ")[2])
    assert listed == [str(folder / place) for place in places]
    assert models.merge(sft=listed[1]).status == "merged"


PLACES: dict[str, tuple[list[str], str]] = {
    "ms-swift": (["v0-20250101-12/checkpoint-8", "v1-20250102-12/checkpoint-4"], "v1-20250102-12/checkpoint-4"),
    "epochs": (["epoch_0", "epoch_2", "epoch_10"], "epoch_10"),
    "the last of all": (["step_100", "step_200", "final"], "final"),
    "verl": (["global_step_5/actor/hf", "global_step_10/actor/hf"], "global_step_10/actor/hf"),
    "one": (["hf"], "hf"),
    "and others": (["checkpoint-9", "checkpoint-10", "original", "onnx", "checkpoint-11/optimizer"], "checkpoint-10"),
}


@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("beside", ["", "training_args.bin", "latest_checkpointed_iteration.txt"])
def test_a_folder_above_a_model_is_answered_with_its_place(models: Models, layout: str, beside: str) -> None:
    places, latest = PLACES[layout]
    for place in places:
        write_model(models.folder / "run" / place, random_state(SHAPES), config=CONFIG)
    if beside:
        (models.folder / "run" / beside).write_text("x")
    message = models.refused(
        CheckpointError, rf"no model at its top.*'\S*run/{latest}': give that", sft=models.folder / "run"
    )
    found = re.search(r"(?:latest is|one in) '(\S+)': give that", message)
    assert found is not None
    assert models.merge(sft=found[1]).status == "merged"


def test_adapters_and_other_forms_below_are_found_too(models: Models) -> None:
    for files, match in (
        (["checkpoint-2/adapter_model.safetensors", "checkpoint-2/adapter_config.json"], "checkpoint-2': give that"),
        (["checkpoint-3/pytorch_model.bin"], "checkpoint-3': give that"),
        (["checkpoint-4/pytorch_model_fsdp_0/.metadata", "checkpoint-4/optimizer_0/.metadata"], "checkpoint-4': give"),
        (["step-5/.metadata", "step-5/__0_0.distcp"], "step-5': give that"),
        (
            [
                "latest_checkpointed_iteration.txt",
                "global_step_6/actor/model_world_size_2_rank_0.pt",
                "global_step_6/actor/huggingface/config.json",
            ],
            r"shards of verl ranks; .*--backend fsdp --local_dir \S*/global_step_6/actor --target_dir",
        ),
        (
            ["checkpoint-7/zero_to_fp32.py", "checkpoint-7/latest", "training_args.bin"],
            r"holds in 'checkpoint-7' a DeepSpeed checkpoint; .*`cd \S+/checkpoint-7 && python zero_to_fp32.py",
        ),
        (["final/lit_model.pth", "step-5/lit_model.pth"], r"'final' a LitGPT checkpoint; .*from_litgpt \S+/final"),
        (["checkpoint-8/trainer_state.json"], "holds no weights"),
    ):
        folder = models.folder / f"run{len(match)}"
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        models.refused(CheckpointError, match, sft=folder)


def test_what_does_not_exist_is_refused(models: Models) -> None:
    for sft in (models.folder / "gone", str(models.folder / "gone"), "a/b/c", "./org/name", Path("org/name")):
        models.refused(CheckpointError, r"sft .* does not exist; give a folder, a \.safetensors file or a hub", sft=sft)


@pytest.mark.parametrize("name", ["~nobody.here/sft", "x" * 300, ""])
def test_paths_that_cannot_be_are_refused_in_one_line(models: Models, name: str) -> None:
    models.refused(CheckpointError, r"sft .*(does not exist|cannot be|is empty)", sft=name)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.gguf", r"is GGUF weights; not supported: use the original safetensors checkpoint"),
        ("old.bin", r"is PyTorch pickles; not supported: .*save_pretrained"),
        ("zero_to_fp32.py", r"is a DeepSpeed checkpoint; .*`cd \S+/alone && python zero_to_fp32\.py"),
        ("config.json", r"is not a \.safetensors file; give a folder, a \.safetensors file or a hub id"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(models: Models, name: str, match: str) -> None:
    (models.folder / "alone").mkdir()
    path = models.folder / "alone" / name
    path.write_text("{}")
    models.refused(CheckpointError, rf"sft \S+/{re.escape(name)} {match}", sft=path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", INDEX, "pytorch_model.bin", "model-q4.gguf", "imm_recipe.json"]
)
def test_a_file_of_a_model_is_answered_with_its_folder(models: Models, name: str) -> None:
    if name == INDEX:
        sharded(models)
    elif name == "pytorch_model.bin":
        (models.sft / MODEL).unlink()
        torch.save(random_state(SHAPES, seed=3), models.sft / name)
    elif name == "imm_recipe.json":
        models.merge(out=models.folder / "merged")
        models.sft = models.folder / "merged"
    elif not (models.sft / name).exists():
        (models.sft / name).write_text("x")
    message = models.refused(
        CheckpointError, rf"sft \S+/{name} is not a \.safetensors file; give its folder", sft=models.sft / name
    )
    assert models.merge(sft=after(message, "give its folder, ")).status == "merged"


def after(message: str, words: str) -> str:
    """Return what a message quotes after some words."""
    found = re.search(r"'([^']+)'", message.partition(words)[2])
    assert found is not None
    return found[1]


def test_shards_without_their_index_are_refused_as_such(models: Models) -> None:
    index = sharded(models)
    (models.sft / INDEX).unlink()
    models.refused(
        CheckpointError, rf"sft \S+ lacks {INDEX}, which belongs to its 2 shards; copy or download what is missing"
    )
    shard = models.sft / "model-00002-of-00002.safetensors"
    models.refused(CheckpointError, r"base \S+ lacks", base=models.sft)
    content = shard.read_bytes()
    shard.unlink()
    models.refused(CheckpointError, rf"lacks {INDEX}, which belongs to its 2 shards, and 1 of those; copy or download")
    shard.write_bytes(content)
    (models.sft / INDEX).write_text(json.dumps(index))
    assert models.merge().status == "merged"


def test_pickled_shards_without_their_index_are_refused_as_such(models: Models) -> None:
    (models.sft / MODEL).unlink()
    for number in (1, 2):
        (models.sft / f"pytorch_model-0000{number}-of-00002.bin").write_bytes(b"x")
    models.refused(CheckpointError, r"lacks pytorch_model\.bin\.index\.json, which belongs to its 2 shards; copy")


def test_one_shard_given_as_a_model_is_answered_with_its_folder(models: Models) -> None:
    sharded(models)
    shard = models.sft / "model-00002-of-00002.safetensors"
    for role in ("sft", "base"):
        options: dict[str, Any] = {role: shard}
        message = models.refused(MismatchError, r"is one shard of a model: give its folder", **options)
        assert after(message, "give its folder, ") == str(models.sft)
    assert models.merge(base=shard, sft=shard).status == "merged"  # shards of two models, one by one


def test_a_single_file_numbered_as_the_only_shard_is_a_model(models: Models) -> None:
    (models.sft / MODEL).rename(models.sft / "model-00001-of-00001.safetensors")
    assert models.merge().status == "merged"


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        (MODEL, []),
        (INDEX, []),
        ("pytorch_model.bin", []),
        ("pytorch_model.bin.index.json", []),
        ("adapter_model.safetensors", ["adapter_config.json"]),
        ("adapter_model.bin", ["adapter_config.json"]),
        ("adapter_config.json", ["adapter_model.safetensors"]),
        (".metadata", ["__0_0.distcp"]),
        ("config.json", [MODEL]),
    ],
)
def test_a_pointer_of_git_lfs_is_named_as_such(models: Models, name: str, beside: list[str]) -> None:
    folder = models.folder / "clone"
    folder.mkdir()
    (folder / name).write_text(POINTER)
    for each in beside:
        (folder / each).write_bytes((models.sft / MODEL).read_bytes() if each.endswith(".safetensors") else b"{}")
    match = rf"clone/{re.escape(name)} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}, or"
    models.refused(CheckpointError, match, sft=folder)
    if name == MODEL:
        models.refused(CheckpointError, match, sft=folder / name)


def test_a_file_to_be_copied_that_is_a_pointer_is_named_as_such(models: Models) -> None:
    (models.sft / "tokenizer.json").write_text(POINTER)
    match = r"sft/tokenizer\.json is a Git LFS pointer.*`git lfs pull` in \S+/sft, or .* leave it out: --leave-out"
    models.refused(CheckpointError, match)
    assert models.merge(leave_out=["tokenizer.json"]).status == "merged"
    assert "tokenizer.json" not in files_of(models.out)


def test_a_shard_that_is_a_pointer_is_named_as_such(models: Models) -> None:
    sharded(models)
    (models.sft / "model-00002-of-00002.safetensors").write_text(POINTER)
    models.refused(CheckpointError, r"model-00002-of-00002\.safetensors is a Git LFS pointer")
