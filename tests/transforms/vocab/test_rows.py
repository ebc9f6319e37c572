"""Common rows are merged, the rest is the owner's: any sizes, starts, ties, heads; misfits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import reference
from checkpoints import random_state, read_model, same_bits, write_model
from loading import EMBED, HEAD, assert_same_bits, config_of
from mergekit_imm import MismatchError, merge_checkpoints, verify
from models import LAYOUTS, fine_tuned, load, new_model, untied
from vocabularies import ENDS, WORDS, Options, expected_of, resize, save, tokenizer_of


@pytest.mark.parametrize("numbers", [{"alpha": 0.5, "drop": 0.9}, {"alpha": 0.7, "drop": 0.0}])
@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_rows_that_both_have_are_merged_and_the_rest_is_the_owner_s(
    resized: tuple[str, Path], tmp_path: Path, vocab: str, numbers: Options
) -> None:
    layout, folder = resized
    given = (folder / "base", folder / "sft")
    report = merge_checkpoints(*given, tmp_path / "out", vocab=vocab, **numbers, verify=True)
    base, sft = read_model(folder / "base"), read_model(folder / "sft")
    expected = expected_of(base, sft, sft if vocab == "sft" else base, 96, **numbers)
    assert_same_bits(read_model(tmp_path / "out"), expected)
    model = load(tmp_path / "out", layout)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    rows = {"base": 96, "sft": 100}[vocab]
    assert model.get_input_embeddings().weight.shape[0] == config_of(tmp_path / "out")["vocab_size"] == rows
    assert len(tokenizer) == {"base": 90, "sft": 100}[vocab]
    assert config_of(tmp_path / "out")["pad_token_id"] == (90 if vocab == "sft" else None)
    assert (
        report.notes
        == {
            "base": [
                f"note: 4 rows of sft {folder / 'sft'} beyond the 96 of base {folder / 'base'} are left out"
                ' (vocab="base")'
            ],
            "sft": [
                f"note: the vocabulary is that of sft {folder / 'sft'}, 100 rows; 96 are merged, and the 4 that base"
                f" {folder / 'base'} lacks are copied"
            ],
        }[vocab]
    )
    verify(tmp_path / "out")


# --- other sizes, starts, ties


def test_a_base_with_padded_rows_and_an_sft_without(tmp_path: Path) -> None:
    """As in Qwen2.5: more rows than tokens in the base, equally many after resizing."""
    model = new_model("llama")
    given = (
        save(model, tmp_path / "base", tokenizer_of(WORDS)),
        save(resize(fine_tuned(model, 2, torch.float32), 90), tmp_path / "sft", tokenizer_of(WORDS)),
    )
    base, sft = map(read_model, given)
    for vocab, rows, owner in (("base", 96, base), ("sft", 90, sft)):
        merge_checkpoints(*given, tmp_path / f"out-{vocab}", vocab=vocab, drop=0.5)
        assert_same_bits(read_model(tmp_path / f"out-{vocab}"), expected_of(base, sft, owner, 90, alpha=0.5, drop=0.5))
        assert load(tmp_path / f"out-{vocab}", "llama").get_output_embeddings().weight.shape[0] == rows
        assert config_of(tmp_path / f"out-{vocab}")["vocab_size"] == rows


@pytest.mark.parametrize("vocab", ["base", "sft"])
@pytest.mark.parametrize("rows", [90, 96, 100, 104])
def test_a_start_of_any_size(resized: tuple[str, Path], tmp_path: Path, vocab: str, rows: int) -> None:
    """Rows that not all three have are the owner's."""
    layout, folder = resized
    model = LAYOUTS[layout].auto.from_pretrained(folder / "base", dtype=torch.bfloat16)
    begin = save(resize(fine_tuned(model, seed=4), rows), tmp_path / "start")
    given = (folder / "base", folder / "sft")
    report = merge_checkpoints(
        *given, tmp_path / "out", start=begin, iteration=1, vocab=vocab, drop=0.0, importance={"0": 1, "1": 3}
    )
    base, sft, start = map(read_model, (*given, begin))
    common = min(rows, 96)
    expected = expected_of(base, sft, sft if vocab == "sft" else base, common, start, alpha=0.5, drop=0.0, iteration=1)
    merged = read_model(tmp_path / "out")
    for name in set(ENDS) & set(base):
        assert same_bits(merged[name], expected[name])
    assert any("has no tokenizer" in note for note in report.notes)
    assert any(f"{common} are merged" in note for note in report.notes) == (common < (100 if vocab == "sft" else 96))
    load(tmp_path / "out", layout)
    verify(tmp_path / "out")
    if rows != 96:  # with the delta from the base, the start is not read
        merge_checkpoints(*given, tmp_path / "other", start=begin, iteration=1, vocab=vocab, drop=0.0, reference="base")
        expected = expected_of(base, sft, sft if vocab == "sft" else base, 96, alpha=0.5, drop=0.0)
        assert same_bits(read_model(tmp_path / "other")[EMBED], expected[EMBED])


@pytest.mark.parametrize("form", ["embedding", "both", "head"])
@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_tied_tensors_under_any_of_their_names(tmp_path: Path, vocab: str, form: str) -> None:
    model = new_model("qwen2")
    given = save(model, tmp_path / "base"), save(resize(fine_tuned(model, seed=2), 100), tmp_path / "sft")
    base, sft = map(read_model, given)
    stored = {"embedding": [EMBED], "both": [EMBED, HEAD], "head": [HEAD]}[form]
    for role, state in (("base", base), ("sft", sft)):
        if role == "base" or form == "both":
            rest = {name: tensor for name, tensor in state.items() if name != EMBED}
            write_model(tmp_path / role, {**rest, **{name: state[EMBED].clone() for name in stored}})
    merge_checkpoints(*given, tmp_path / "out", vocab=vocab, drop=0.5)
    key = HEAD if form == "head" else EMBED
    sides = (base[EMBED][:96], sft[EMBED][:96])
    expected = reference.merge_tensors(*sides, None, torch.bfloat16, name=key, alpha=0.5, drop=0.5)
    if vocab == "sft":
        expected = torch.cat([expected, sft[EMBED][96:]])
    merged = read_model(tmp_path / "out")
    assert {name for name in ENDS if name in merged} == set(stored)
    assert all(same_bits(merged[name], expected) for name in stored)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    load(tmp_path / "out", "qwen2")


@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_a_head_that_was_trained_apart_has_rows_of_its_own(tmp_path: Path, vocab: str) -> None:
    model = new_model("qwen2")
    tuned = untied(resize(fine_tuned(model, seed=2), 100), seed=3)
    given = save(model, tmp_path / "base"), save(tuned, tmp_path / "sft")
    report = merge_checkpoints(*given, tmp_path / "out", vocab=vocab, drop=0.5)
    assert any("config.json says untied" in note for note in report.notes)
    base, sft = map(read_model, given)
    base[HEAD] = base[EMBED]
    owner = sft if vocab == "sft" else base
    expected = expected_of(base, sft, owner, 96, alpha=0.5, drop=0.5)
    assert_same_bits(read_model(tmp_path / "out"), expected)
    assert not same_bits(expected[HEAD], expected[EMBED])
    assert load(tmp_path / "out", "qwen2").config.tie_word_embeddings is False


def test_a_bias_of_the_head_is_resized_with_it(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(
        vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=8, tie_word_embeddings=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.GPTJForCausalLM(config)
        model.lm_head.bias.data.normal_()
    given = save(model, tmp_path / "base"), save(resize(fine_tuned(model, seed=2), 100), tmp_path / "sft")
    base, sft = map(read_model, given)
    name = "lm_head.bias"
    for vocab, rest in (("base", sft[name][:0]), ("sft", sft[name][96:])):
        merge_checkpoints(*given, tmp_path / f"out-{vocab}", vocab=vocab, drop=0.5)
        merged = reference.merge_tensors(
            base[name], sft[name][:96], None, torch.float32, name=name, alpha=0.5, drop=0.5
        )
        assert same_bits(read_model(tmp_path / f"out-{vocab}")[name], torch.cat([merged, rest]))
        transformers.GPTJForCausalLM.from_pretrained(tmp_path / f"out-{vocab}")


# --- what does not fit


def test_kept_and_taken_embeddings_have_the_rows_of_the_vocabulary(resized: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = resized
    given = folder / "base", folder / "sft"
    base, sft = (read_model(each)[EMBED] for each in given)
    merge_checkpoints(*given, tmp_path / "keep", vocab="sft", keep=["embed_tokens"])
    assert same_bits(read_model(tmp_path / "keep")[EMBED], torch.cat([base, sft[96:]]))
    merge_checkpoints(*given, tmp_path / "take", vocab="base", take=["embed_tokens"])
    assert same_bits(read_model(tmp_path / "take")[EMBED], sft[:96])


def test_a_model_without_a_known_embedding_says_so(tmp_path: Path) -> None:
    for role in ("base", "sft"):
        write_model(tmp_path / role, random_state({"w": (4, 4)}))
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", vocab="sft")
    assert "has no embedding under a known name" in report.notes[0]


def test_embeddings_that_were_not_resized_alike_are_refused(tmp_path: Path) -> None:
    given = tmp_path / "base", tmp_path / "sft"
    write_model(given[0], random_state({EMBED: (8, 4), HEAD: (8, 4)}))
    for head in (8, 10):
        write_model(given[1], random_state({EMBED: (9, 4), HEAD: (head, 4)}))
        for vocab in ("base", "sft"):
            with pytest.raises(MismatchError, match=rf"have \[8\] and \[{min(head, 9)}, {max(head, 9)}\] rows"):
                merge_checkpoints(*given, tmp_path / "out", vocab=vocab)
