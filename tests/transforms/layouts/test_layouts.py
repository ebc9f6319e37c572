"""Every layout, loaded back: all tensors present and right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from checkpoints import read_model
from loading import (
    Pair,
    assert_index_is_right,
    assert_same_bits,
    config_of,
    header,
)
from mergekit_imm import dare_merge, merge_checkpoints
from models import LAYOUTS, dtypes_in, exact_state, load, template


def test_files_hold_the_names_a_layout_is_known_by(pair: Pair) -> None:
    names = {LAYOUTS[pair.layout].known_by, LAYOUTS[pair.layout].embedding}
    assert names <= set(read_model(pair.base)) & set(read_model(pair.sft))
    sharded = [len(list(folder.glob("*.safetensors"))) > 1 for folder in (pair.base, pair.sft)]
    assert sorted(sharded) == [False, True]


def test_a_merged_model_loads_with_no_key_missing_or_left_over(pair: Pair, plain: Path) -> None:
    model = load(plain, pair.layout)
    in_float32 = {name for name, tensor in model.state_dict().items() if tensor.dtype != torch.bfloat16}
    assert all("e_score_correction" in name for name in in_float32)  # as in transformers
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == LAYOUTS[pair.layout].tied == config_of(plain)["tie_word_embeddings"]


def test_loaded_tensors_are_the_mean_rounded_once(pair: Pair, plain: Path) -> None:
    base, sft, merged = (exact_state(folder, pair.layout) for folder in (pair.base, pair.sft, plain))
    assert sorted(merged) == sorted(base)
    for name, tensor in merged.items():
        mean = 0.3 * base[name] + 0.7 * sft[name]
        spacing = torch.ldexp(torch.ones_like(mean), torch.frexp(mean).exponent - 8)  # of bfloat16
        float32 = 2**-23 * (base[name].abs() + sft[name].abs())
        assert ((tensor - mean).abs() <= spacing / 2 + float32).all(), name
        assert not torch.equal(tensor, base[name]), name


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_every_tensor_has_the_bits_of_dare_merge(pair: Pair, tmp_path: Path, drop: float) -> None:
    out = tmp_path / "out"
    report = merge_checkpoints(pair.base, pair.sft, out, alpha=0.3, drop=drop, seed=5)
    base, sft = read_model(pair.base), read_model(pair.sft)
    assert_same_bits(read_model(out), dare_merge(base, sft, alpha=0.3, drop=drop, seed=5))
    assert report.tensors == {"merged": len(base), "kept": 0, "taken": 0, "copied": 0}
    load(out, pair.layout)


def test_the_output_lies_as_the_base_does(pair: Pair, plain: Path) -> None:
    files = sorted(file.name for file in pair.base.glob("*.safetensors"))
    assert sorted(file.name for file in plain.glob("*.safetensors")) == files
    assert [header(plain / file) for file in files] == [header(pair.base / file) for file in files]
    assert (plain / "model.safetensors.index.json").exists() == (len(files) > 1)
    if len(files) > 1:
        assert_index_is_right(plain)


def test_tokenizer_and_generation_config_are_those_of_the_sft(pair: Pair, plain: Path) -> None:
    assert AutoTokenizer.from_pretrained(plain).chat_template == template("sft")
    tokens = PreTrainedTokenizerFast.from_pretrained(plain).tokenize("merge back sft base")
    assert tokens == ["merge", "back", "sft", "<unk>"]
    assert GenerationConfig.from_pretrained(plain).stop_strings == ["sft"]


@pytest.mark.parametrize(
    ("dtype", "written", "code"),
    [(None, torch.bfloat16, "BF16"), ("float32", torch.float32, "F32"), ("float16", torch.float16, "F16")],
)
def test_a_float32_sft_is_merged_into_the_dtype_of_the_base_or_the_one_asked_for(
    wide: Pair, tmp_path: Path, dtype: str | None, written: torch.dtype, code: str
) -> None:
    out = tmp_path / "out"
    report = merge_checkpoints(wide.base, wide.sft, out, drop=0.5, dtype=dtype)
    assert {entry[1] for entry in header(out / "model.safetensors")[0]} == {code}
    base, sft = read_model(wide.base), read_model(wide.sft)
    assert {tensor.dtype for tensor in sft.values()} == {torch.float32}
    assert_same_bits(read_model(out), dare_merge(base, sft, drop=0.5, dtype=written))

    said, name = dtypes_in(config_of(out)), str(written).removeprefix("torch.")
    assert said == dict.fromkeys(dtypes_in(config_of(wide.sft)), name)
    assert report.config_changes == ({} if written == torch.float32 else said)
    model = load(out, wide.layout)
    assert model.config.dtype == written
    assert {tensor.dtype for tensor in model.state_dict().values()} == {written}
