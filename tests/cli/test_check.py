"""`imm-merge --check` reports from headers what can and cannot be merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers

from checkpoints import files_of, random_state, write_model
from commands import Command
from mergekit_imm import merge_checkpoints
from models import fine_tuned, new_model, save


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, with models that can and cannot be merged into it."""
    folder = tmp_path_factory.mktemp("models")
    model = new_model("qwen3_moe")
    save(model, folder / "base", "base", "20KB")
    tuned = fine_tuned(model, seed=2)
    save(tuned, folder / "sft", "sft")
    tuned.save_pretrained(folder / "in memory", save_original_format=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(new_model("qwen3_moe"), peft.LoraConfig(target_modules=["q_proj"]))
        wrapped.save_pretrained(folder / "adapter")
    other = new_model("qwen2")
    other.save_pretrained(folder / "other")
    return folder


@pytest.fixture
def there(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    return models


def test_all_that_fits_is_in_a_table(there: Path, merge: Command) -> None:
    before = files_of(there)
    ended = merge("--check", "base", "in memory")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0] == "in memory can be merged into base, judging by headers alone: values are not read"
    assert lines[1].startswith("  base   base: safetensors, 45 tensors, 25.02 k parameters, in model-00001-of-0000")
    assert lines[2] == "  sft    in memory: safetensors, 45 tensors, 25.02 k parameters, in model.safetensors"
    assert "  model.layers.*.mlp.experts.*.down_proj.weight         8      4.10 k  BF16  BF16  BF16  merge" in lines
    renamed = "  8 tensors 'model.layers.*.mlp.experts.down_proj[*]' of sft are"
    assert any(line.startswith(renamed) for line in lines)
    assert "drop" not in ended.out
    assert files_of(there) == before


def test_what_it_says_is_what_a_merge_does(there: Path, merge: Command, tmp_path: Path) -> None:
    for sft in ("sft", "in memory", "adapter"):
        checked = json.loads(merge("--check", "base", sft, "--json").out)
        report = merge_checkpoints(there / "base", there / sft, tmp_path / sft, dry_run=True).to_dict()
        assert checked["problems"] == []
        for key in ("kinds", "renamed", "config_changes", "side_files", "left_out"):
            assert checked[key] == report[key], key


def test_every_problem_is_listed_and_the_exit_status_is_1(there: Path, merge: Command) -> None:
    ended = merge("--check", "base", "other")
    assert ended.status == 1
    assert ended.err == "error: other cannot be merged into base; 3 reasons are listed above\n"
    refused = [line for line in ended.out.splitlines() if line.startswith("  refused: ")]
    assert "base base has model_type qwen3_moe, sft other has qwen2; they must be one architecture" in refused[0]
    assert "31 tensors are in base base only, not in sft other" in refused[1]
    assert "12 tensors are in sft other only, not in base base" in refused[2]
    assert "  model.layers.*.mlp.gate_proj.weight                   2      4.10 k  -     BF16  -     refused" in (
        ended.out.splitlines()
    )
    checked = json.loads(merge("--check", "base", "other", "--json").out)
    assert [problem[:4] for problem in checked["problems"]] == ["base", "31 t", "12 t"]
    counts = {False: 0, True: 0}
    for kind in checked["kinds"]:
        counts[kind["action"] == "refused"] += kind["tensors"]
    assert counts == {True: 31 + 12, False: 45 - 31}


def test_every_tensor_whose_shape_differs_is_told(
    tmp_path: Path, merge: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("base"), random_state({"a.w": (4, 4), "b.w": (4, 4), "c.w": (4, 4)}))
    state = random_state({"a.w": (4, 5), "b.w": (4, 4), "c.w": (3, 4)})
    write_model(Path("sft"), state)
    ended = merge("--check", "base", "sft")
    assert ended.status == 1
    assert [line[:34] for line in ended.out.splitlines() if "refused: " in line] == [
        "  refused: tensor 'a.w' is BF16 [4",
        "  refused: tensor 'c.w' is BF16 [4",
    ]
    ended = merge("--check", "base", "sft", "--keep", "^[ac]")
    assert ended.status == 0


def test_several_models_are_checked_each(there: Path, merge: Command) -> None:
    ended = merge("--check", "base", "sft", "adapter", "other", "nowhere")
    assert ended.status == 1
    assert ended.err == "error: other, nowhere cannot be merged into base; 4 reasons are listed above\n"
    assert "adapter can be merged into base" in ended.out
    assert "  sft    adapter: LoRA adapter, 4 tensors" in ended.out
    assert "refused: sft nowhere does not exist" in ended.out
    assert len(json.loads(merge("--check", "base", "sft", "adapter", "--json").out)) == 2


def test_a_start_is_checked_too_and_needs_no_round(there: Path, merge: Command, tmp_path: Path) -> None:
    ended = merge("--check", "base", "sft", "--start", "in memory")
    assert ended.status == 0
    assert "  start  in memory: safetensors" in ended.out
    write_model(tmp_path / "start", {"x": torch.zeros(1)})
    assert merge("--check", "base", "sft", "--start", tmp_path / "start").status == 1


def test_without_check_there_is_one_sft_and_an_out(there: Path, merge: Command) -> None:
    ended = merge("base", "sft")
    message = "Missing option '-o' / '--out': give the folder to create, -o merged; see imm-merge --help"
    assert (ended.status, ended.error) == (2, message)
    ended = merge("base", "sft", "adapter", "-o", "out")
    assert (
        ended.status,
        "Got 2 models to merge into base: sft, adapter; give one, or --check; see imm-merge --help" in ended.err,
    ) == (
        2,
        True,
    )


def test_a_larger_vocabulary_is_told_with_its_tokens(
    tmp_path: Path, merge: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = new_model("llama")
    save(model, Path("base"), "base")
    tuned = fine_tuned(model, seed=2)
    tuned.resize_token_embeddings(100, mean_resizing=False)
    save(tuned, Path("sft"), "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained("sft")
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained("sft")
    ended = merge("--check", "base", "sft")
    assert ended.status == 1
    assert "<pad>" in ended.out
    assert ended.out.count("  refused: tensor") == 2  # the embedding and the head
    ended = merge("--check", "base", "sft", "--vocab", "sft")
    assert (ended.status, "config.json" in ended.out) == (0, True)
