"""Side files, files of other shapes, rounds, tensors with special rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from checkpoints import files_of, random_state, read_model, write_model
from loading import (
    EMBED,
    Pair,
    assert_index_is_right,
    assert_same_bits,
    config_of,
    header,
)
from mergekit_imm import MergeReport, dare_merge, merge_checkpoints
from mergekit_imm.errors import MismatchError
from models import fine_tuned, load, save, template

FROM_SFT = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "2_Dense/config.json",
    "LICENSE",
]
FROM_BASE = ["additional_chat_templates/tools.jinja", "1_Pooling/config.json", "NOTICE.txt"]
LEFT_OUT = [
    "checkpoint-10/config.json",
    "checkpoint-10/model.safetensors",
    "consolidated.safetensors",
    "model.gguf",
    "modeling_x.py",
    "onnx/model.onnx",
    "onnx/config.json",
    "optimizer.pt",
    "original/params.json",
    "original/consolidated.00.pth",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rng_state_0.pth",
    "runs/host/events.out.tfevents.1",
    "all_results.json",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "wandb/run-1/config.yaml",
    "README.md",
]
HIDDEN = [".git/config", ".gitattributes", ".cache/lock.json"]
HIDDEN_AS_LISTED = [".git/", ".gitattributes", ".cache/"]


@pytest.fixture(scope="module")
def cluttered(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair among the usual clutter of model folders; each file names its owner."""
    folder = tmp_path_factory.mktemp("cluttered")
    state = random_state({EMBED: (8, 4), "model.layers.0.w": (4, 4)})
    clutter = [*FROM_SFT, *LEFT_OUT, *HIDDEN]
    config = {"model_type": "llama", "tie_word_embeddings": True, "dtype": "bfloat16"}
    base, sft = (
        write_model(
            folder / role, state, config={**config, "of": role}, side={name: f"{role}'s {name}" for name in names}
        )
        for role, names in (("base", [*clutter, *FROM_BASE]), ("sft", clutter))
    )
    return Pair("", base, sft)


@pytest.fixture(scope="module")
def tidy(cluttered: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MergeReport]:
    out = tmp_path_factory.mktemp("tidy") / "out"
    return out, merge_checkpoints(cluttered.base, cluttered.sft, out)


def test_side_files_are_the_sft_s_where_it_has_them_and_else_the_base_s(tidy: tuple[Path, MergeReport]) -> None:
    out, report = tidy
    own = {"imm_recipe.json", "imm_report.json", "README.md", "model.safetensors", "config.json"}
    sides = {name: content.decode() for name, content in files_of(out).items() if name not in own}
    assert sides == {name: f"sft's {name}" for name in FROM_SFT} | {name: f"base's {name}" for name in FROM_BASE}
    assert config_of(out)["of"] == "sft"
    assert report.side_files == {"sft": sorted([*FROM_SFT, "config.json"]), "base": sorted(FROM_BASE)}


def test_what_is_left_out_is_listed(tidy: tuple[Path, MergeReport]) -> None:
    out, report = tidy
    listed = sorted([*LEFT_OUT, *HIDDEN_AS_LISTED])
    assert report.left_out == {"base": listed, "sft": listed}
    assert json.loads((out / "imm_report.json").read_text())["left_out"] == report.left_out


def test_the_model_card_is_ours(tidy: tuple[Path, MergeReport], cluttered: Pair) -> None:
    card = (tidy[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert str(cluttered.base) in card
    assert "README.md" not in card


def test_code_is_copied_when_asked_for(cluttered: Pair, tmp_path: Path, tidy: tuple[Path, MergeReport]) -> None:
    report = merge_checkpoints(cluttered.base, cluttered.sft, tmp_path / "out", copy_code=True)
    assert sorted(files_of(tmp_path / "out")) == sorted([*files_of(tidy[0]), "modeling_x.py"])
    assert (tmp_path / "out" / "modeling_x.py").read_text() == "sft's modeling_x.py"
    assert "modeling_x.py" not in report.left_out["sft"]


def test_a_new_layout_holds_the_same_tensors(pair: Pair, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(pair.base, pair.sft, out, alpha=0.3, drop=0.0, max_shard_size="20KB")
    assert_same_bits(read_model(out), read_model(plain))
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert_index_is_right(out)
    state = read_model(out)
    for file in files:  # a tensor larger than a shard gets its own
        sizes = [state[name].nbytes for name, _, _ in header(file)[0]]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    load(out, pair.layout)


def test_a_new_layout_of_one_file_has_no_index(llama: Pair, tmp_path: Path) -> None:
    merge_checkpoints(llama.base, llama.sft, tmp_path / "sharded")
    merge_checkpoints(llama.base, llama.sft, tmp_path / "out", max_shard_size="5GB")
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert_same_bits(read_model(tmp_path / "out"), read_model(tmp_path / "sharded"))
    load(tmp_path / "out", "llama")


def test_a_file_as_base_gives_a_folder_with_all_else_from_the_sft(qwen2: Pair, tmp_path: Path) -> None:
    merge_checkpoints(qwen2.base, qwen2.sft, tmp_path / "folders", drop=0.5)
    folder = write_model(tmp_path / "base", read_model(qwen2.base), side={"config.json": "not read", "NOTICE": ""})
    report = merge_checkpoints(folder / "model.safetensors", qwen2.sft, tmp_path / "out", drop=0.5)
    assert_same_bits(read_model(tmp_path / "out"), read_model(tmp_path / "folders"))
    assert set(report.side_files) == {"sft"}
    assert config_of(tmp_path / "out") == config_of(qwen2.sft)
    load(tmp_path / "out", "qwen2")


def test_a_file_as_sft_gives_a_folder_with_all_else_from_the_base(llama: Pair, tmp_path: Path) -> None:
    merge_checkpoints(llama.base, llama.sft, tmp_path / "folders", drop=0.5)
    report = merge_checkpoints(llama.base, llama.sft / "model.safetensors", tmp_path / "out", drop=0.5)
    assert_same_bits(read_model(tmp_path / "out"), read_model(tmp_path / "folders"))
    assert set(report.side_files) == {"base"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template("base")
    load(tmp_path / "out", "llama")


def test_a_file_of_any_name_is_written_as_model_safetensors(qwen2: Pair, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes((qwen2.base / "model.safetensors").read_bytes())
    merge_checkpoints(file, qwen2.base / "model.safetensors", tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == [
        "README.md",
        "imm_recipe.json",
        "imm_report.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_model_merged_with_itself_is_that_model(pair: Pair, tmp_path: Path, drop: float) -> None:
    report = merge_checkpoints(pair.base, pair.base, tmp_path / "out", alpha=0.3, drop=drop)
    assert_same_bits(read_model(tmp_path / "out"), read_model(pair.base))
    assert any("same model" in note for note in report.notes)


def test_a_merge_as_base_or_sft_is_noted_unless_the_round_says_so(llama: Pair, tmp_path: Path) -> None:
    """A round whose start was forgotten: nothing else shows that its base has been pulled back before."""
    merged = tmp_path / "merged"
    assert merge_checkpoints(llama.base, llama.sft, merged).notes == []
    (note,) = merge_checkpoints(merged, llama.sft, tmp_path / "forgotten").notes
    assert note.startswith(f"note: base {merged} is a merge itself: for its next round give it as start, and")
    (note,) = merge_checkpoints(llama.base, merged, tmp_path / "twice").notes
    assert note.startswith(f"note: sft {merged} is a merge itself; this one pulls it back once more")
    assert merge_checkpoints(llama.base, llama.sft, tmp_path / "next", start=merged).notes == []
    assert merge_checkpoints(merged, llama.sft, tmp_path / "later", iteration=1).notes == []


def test_a_round_from_a_merged_model_counts_on(llama: Pair, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"round{number}" for number in range(3))
    merge_checkpoints(llama.base, llama.sft, first, drop=0.5)
    sfts = []
    for number, start in enumerate((first, second)):
        tuned = fine_tuned(load(start, "llama"), seed=10 + number)
        sfts.append(save(tuned, tmp_path / f"sft{number}", "sft"))
        merge_checkpoints(llama.base, sfts[-1], (second, third)[number], start=start, drop=0.5)

    recipes = [json.loads((folder / "imm_recipe.json").read_text()) for folder in (first, second, third)]
    assert [recipe["parameters"]["iteration"] for recipe in recipes] == [0, 1, 2]
    assert [[past["parameters"]["iteration"] for past in recipe["history"]] for recipe in recipes] == [[], [0], [0, 1]]
    base = read_model(llama.base)
    for number, (start, out) in enumerate(((first, second), (second, third)), 1):
        expected = dare_merge(base, read_model(sfts[number - 1]), start=read_model(start), drop=0.5, iteration=number)
        assert_same_bits(read_model(out), expected)
        load(out, "llama")


def test_a_start_that_is_the_base_is_round_zero(llama: Pair, tmp_path: Path) -> None:
    for out, start in (("none", None), ("base", llama.base)):
        merge_checkpoints(llama.base, llama.sft, tmp_path / out, start=start)
    assert files_of(tmp_path / "base") == files_of(tmp_path / "none")


def test_kept_taken_and_undropped_tensors(wide: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keep, take, no_drop = r"norm", r"self_attn\.q_proj", r"mlp\.(up|down)_proj"
    report = merge_checkpoints(wide.base, wide.sft, out, drop=0.5, keep=[keep], take=[take], no_drop=[no_drop])
    base, sft = read_model(wide.base), read_model(wide.sft)
    expected = dare_merge(base, sft, drop=0.5)
    undropped = dare_merge(base, sft, drop=0.0)
    for name in base:
        if re.search(keep, name):
            expected[name] = base[name]
        elif re.search(take, name):
            expected[name] = sft[name].to(torch.bfloat16)
        elif re.search(no_drop, name):
            expected[name] = undropped[name]
    assert_same_bits(read_model(out), expected)
    kept, taken = (sum(bool(re.search(pattern, name)) for name in base) for pattern in (keep, take))
    assert report.tensors == {"merged": len(base) - kept - taken, "kept": kept, "taken": taken, "copied": 0}
    load(out, wide.layout)


BUFFERS = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]


@pytest.mark.parametrize(("owner", "option"), [("base", "keep"), ("sft", "take")])
def test_tensors_that_one_side_has_alone_need_a_rule(llama: Pair, tmp_path: Path, owner: str, option: str) -> None:
    """Old Llama files have rotary frequencies, new ones do not; transformers reads both."""
    states = {"base": read_model(llama.base), "sft": read_model(llama.sft)}
    buffers = random_state(dict.fromkeys(BUFFERS, (4,)), dtype=torch.float32)
    folders = {
        role: write_model(tmp_path / role, state | (buffers if role == owner else {}), config=config_of(llama.base))
        for role, state in states.items()
    }
    with pytest.raises(MismatchError, match=rf"2 tensors are in {owner} .* only.*inv_freq.* {option}="):
        merge_checkpoints(folders["base"], folders["sft"], tmp_path / "refused")
    assert not list(tmp_path.glob("refused*"))

    rules = {"keep": (), "take": ()} | {option: ("inv_freq$",)}
    merge_checkpoints(folders["base"], folders["sft"], tmp_path / "out", keep=rules["keep"], take=rules["take"])
    written = buffers if owner == "base" else {name: tensor.bfloat16() for name, tensor in buffers.items()}
    assert_same_bits(read_model(tmp_path / "out"), dare_merge(states["base"], states["sft"]) | written)
    load(tmp_path / "out", "llama")
