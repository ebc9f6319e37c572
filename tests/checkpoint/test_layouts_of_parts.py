"""Models with their parts in different places, single components, and links to folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import State, random_state, read_model, write_model
from mergekit_imm import CheckpointError, MismatchError, merge_checkpoints

ROOT = {"embeddings.word_embeddings.weight": (40, 16), "encoder.layer.0.output.weight": (16, 64)}
DENSE = {"linear.weight": (8, 16)}
CONFIG = {"model_type": "bert", "tie_word_embeddings": False, "dtype": "float32"}


def write_transformer(folder: Path, seed: int, place: str) -> tuple[State, State]:
    """Write a transformer, maybe in a sub-folder, with the file its loader needs and a module after it."""
    root, dense = random_state(ROOT, seed=seed), random_state(DENSE, seed=seed + 1)
    write_model(folder / place, root, config=CONFIG, side={"tokenizer.json": json.dumps(seed)})
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": place}, {"idx": 1, "path": "1_Dense"}]))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(seed))
    write_model(folder / "1_Dense", dense, config={"in_features": 16})
    return root, dense


@pytest.mark.parametrize(("of_base", "of_sft"), [("0_Transformer", ""), ("", "0_Transformer")])
def test_a_part_in_another_place_takes_its_files_along(tmp_path: Path, of_base: str, of_sft: str) -> None:
    """sentence-transformers used to store the transformer in `0_Transformer/`, and now stores it at the top level."""
    base = write_transformer(tmp_path / "base", 1, of_base)
    sft = write_transformer(tmp_path / "sft", 5, of_sft)
    out = tmp_path / "out"
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", out, drop=0)
    place, *_ = (module["path"] for module in json.loads((out / "modules.json").read_text()))
    assert place == of_base
    for folder, one, other in ((place, base[0], sft[0]), ("1_Dense", base[1], sft[1])):
        found = read_model(out / folder)
        mean = {name: ((one[name].float() + other[name].float()) / 2).to(one[name].dtype) for name in one}
        assert found.keys() == mean.keys()
        for name, tensor in mean.items():
            torch.testing.assert_close(found[name], tensor)
    assert (out / place / "tokenizer.json").read_text() == "5"
    assert (out / "config_sentence_transformers.json").read_text() == "5"
    assert {path.name for path in out.rglob("tokenizer.json")} == {"tokenizer.json"}
    assert len([*out.rglob("tokenizer.json")]) == 1
    assert json.loads((out / place / "config.json").read_text())["model_type"] == "bert"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_component_of_a_pipeline_alone_keeps_the_names_that_its_loader_looks_for(
    tmp_path: Path, sharded: bool
) -> None:
    stem = "diffusion_pytorch_model"
    states = {role: random_state(ROOT, seed=seed) for role, seed in (("base", 1), ("sft", 2))}
    for role, state in states.items():
        folder = tmp_path / role
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        if not sharded:
            save_file(state, folder / f"{stem}.safetensors")
            continue
        places = {name: f"{stem}-{n:05}-of-00002.safetensors" for n, name in enumerate(state, 1)}
        for name, file in places.items():
            save_file({name: state[name]}, folder / file)
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    out = tmp_path / "out"
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", out, drop=0)
    names = {"README.md", "imm_recipe.json", "imm_report.json"}
    assert {path.name for path in out.iterdir()} - names == {path.name for path in (tmp_path / "base").iterdir()}
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in states["base"].items():
        mean = (tensor.float() + states["sft"][name].float()) / 2
        torch.testing.assert_close(found[name].float(), mean, rtol=1e-2, atol=1e-2)
    # diffusers passes every setting to the class, which has no dtype.
    assert json.loads((out / "config.json").read_text()) == {"_class_name": "UNet2DConditionModel"}


def test_a_link_to_a_folder_of_weights_is_refused(tmp_path: Path) -> None:
    for role, seed in (("base", 1), ("sft", 2)):
        write_model(tmp_path / role, random_state(ROOT, seed=seed), config=CONFIG)
        write_model(tmp_path / f"{role}_dense", random_state(DENSE, seed=seed))
        (tmp_path / role / "1_Dense").symlink_to(tmp_path / f"{role}_dense")
    (tmp_path / "sft" / "again").symlink_to(".")  # its target is found anyway
    with pytest.raises(CheckpointError, match=r"a link to another folder.*leave it out: leave_out=\[r\"1_Dense/\"\]"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", leave_out=["1_Dense/"])
    assert "1_Dense/" in report.left_out["base"]


def test_a_name_with_brackets_is_left_out_by_its_name(tmp_path: Path) -> None:
    for role, seed in (("base", 1), ("sft", 2)):
        write_model(tmp_path / role, random_state(ROOT, seed=seed), config=CONFIG)
    (tmp_path / "sft" / "a[1]*").mkdir()
    save_file(random_state(DENSE, seed=3), tmp_path / "sft" / "a[1]*" / "m[0].safetensors")
    report = merge_checkpoints(
        tmp_path / "base", tmp_path / "sft", tmp_path / "out", leave_out=["a[1]*/m[0].safetensors"]
    )
    assert report.left_out["sft"] == ["a[1]*/m[0].safetensors"]


def test_weights_beside_an_adapter_are_no_copies_whatever_they_are_called(tmp_path: Path) -> None:
    """trl saves the value head of an adapter as `pytorch_model.bin`."""
    write_model(tmp_path / "base", random_state(ROOT, seed=1), config=CONFIG)
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    path = "base_model.model.encoder.layer.0.output"
    factors = {f"{path}.lora_A.weight": torch.ones(2, 64), f"{path}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors, sft / "adapter_model.safetensors")
    torch.save({"v_head.summary.weight": torch.ones(1, 16)}, sft / "pytorch_model.bin")
    with pytest.raises(MismatchError, match=r"in sft .*\(pytorch_model\.bin\) only.*'v_head\.summary\.weight'"):
        merge_checkpoints(tmp_path / "base", sft, tmp_path / "out")
    merge_checkpoints(tmp_path / "base", sft, tmp_path / "out", take=["v_head"])
    assert read_model(tmp_path / "out").keys() == {*ROOT, "v_head.summary.weight"}


def test_a_state_of_a_training_below_a_model_is_not_to_be_taken(tmp_path: Path) -> None:
    for role, seed in (("base", 1), ("sft", 2), ("sft/final", 3)):
        write_model(tmp_path / role, random_state(ROOT, seed=seed), config=CONFIG)
    with pytest.raises(MismatchError, match=r"another checkpoint of the same model; or leave the file out") as refusal:
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert "take" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model-00001-of-00002.safetensors", "a shard in model.safetensors.index.json"),
        ("*", "without what leave_out names"),
    ],
)
def test_a_model_without_its_own_files_is_none(tmp_path: Path, name: str, match: str) -> None:
    for role, seed in (("base", 1), ("sft", 2)):
        write_model(tmp_path / role, random_state(ROOT, seed=seed), shards=[[each] for each in ROOT], config=CONFIG)
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", leave_out=[name])


def test_a_component_alone_is_merged_into_its_place_in_a_pipeline(tmp_path: Path) -> None:
    shapes = {"conv_in.weight": (4, 4), "down.0.conv.weight": (4, 4)}
    parts = {
        "unet": random_state(shapes, seed=1),
        "vae": random_state(dict.fromkeys(shapes, (6, 6)), seed=2),
    }
    for part, state in parts.items():
        write_model(tmp_path / "base" / part, state, config={"_class_name": part})
    (tmp_path / "base" / "model_index.json").write_text("{}")
    sft = random_state(shapes, seed=3)
    write_model(tmp_path / "sft", sft, config={"_class_name": "unet", "trained": True})
    out = tmp_path / "out"
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", out, drop=0, keep=["^vae/"])
    assert json.loads((out / "unet" / "config.json").read_text())["_class_name"] == "unet"
    assert not (out / "config.json").exists()
    found = read_model(out / "unet")
    for name, tensor in parts["unet"].items():
        torch.testing.assert_close(found[name], ((tensor.float() + sft[name].float()) / 2).to(tensor.dtype))
    assert {*read_model(out / "vae")} == {*shapes}
