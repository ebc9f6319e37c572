"""Vocabularies of different sizes: resized by transformers, merged, loaded back, and compared with the formulas."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import reference
import strategies
from checkpoints import State, files_of, random_state, read_model, same_bits, write_model
from loading import EMBED, HEAD, assert_same_bits, config_of
from mergekit_imm import (
    CheckpointError,
    MergeError,
    MismatchError,
    NonFiniteError,
    iter_merged,
    merge_checkpoints,
    verify,
)
from models import LAYOUTS, fine_tuned, load, new_model, untied
from vocabularies import WORDS, resize, save, tokenizer_of, write_pair

ENDS = (EMBED, HEAD)
Options = dict[str, Any]


def expected_of(
    base: State, sft: State, owner: State, common: int, start: State | None = None, **numbers: Any
) -> State:
    """The merge by the formulas: rows that all have are merged, the rest is the owner's, in the base's dtype."""
    made = {}
    for name, tensor in base.items():
        rows = common if name in ENDS else len(tensor)
        b, f, s = (each[name][:rows] for each in (base, sft, base if start is None else start))
        made[name] = reference.merge_tensors(b, f, s, tensor.dtype, name=name, **numbers)
        if name in ENDS:
            made[name] = torch.cat([made[name], owner[name][common:].to(tensor.dtype)])
    return made


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def resized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A base of 96 rows and 90 tokens; an sft that has ten tokens more, and 100 rows."""
    return request.param, write_pair(request.param, tmp_path_factory.mktemp(request.param))


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
    assert report.notes == {
        "base": [f"note: 4 rows that sft {folder / 'sft'} has beyond the 96 of base {folder / 'base'} are not in the"
                 " result (--vocab base)"],
        "sft": [f"note: the vocabulary is that of sft {folder / 'sft'}, 100 rows; 96 are merged, and the 4 that base"
                f" {folder / 'base'} lacks are taken from there"],
    }[vocab]  # fmt: skip
    verify(tmp_path / "out")


# --- other sizes, starts, ties


def test_a_base_with_padded_rows_and_an_sft_without(tmp_path: Path) -> None:
    """As Qwen2.5: more rows than tokens in the base, and as many as tokens once they were resized."""
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
    """Rows that are not in all three are the owner's."""
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


# --- adapters

RESIZED: dict[str, tuple[str, Options]] = {
    "llama": ("llama", {"target_modules": ["q_proj"]}),
    "tied": ("qwen2", {"target_modules": ["q_proj"]}),
    "trained": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, trained": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 89]}),
    "tied, tokens": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [89, 3]}),
}


def adapt(base: Path, adapter: Path, merged: Path, layout: str, rows: int, options: Options) -> None:
    """Train an adapter on a model whose embeddings were resized, and merge it as PEFT does."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = LAYOUTS[layout].auto.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(rows, mean_resizing=False)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        wrapped.save_pretrained(adapter, save_embedding_layers=True)
        wrapped.merge_and_unload().save_pretrained(merged)


@pytest.mark.parametrize("kind", RESIZED)
@pytest.mark.parametrize("rows", [90, 100])
def test_adapters_with_resized_embeddings(tmp_path: Path, kind: str, rows: int) -> None:
    """With alpha 0 and no drop the result is PEFT's own merge; with the base's vocabulary, that cut or filled up."""
    layout, options = RESIZED[kind]
    if rows == 100 and "trainable_token_indices" in options:
        options = {**options, "trainable_token_indices": [97, 3, 99]}
    model = new_model(layout)
    model.config.tie_word_embeddings = LAYOUTS[layout].tied
    base = save(model, tmp_path / "base")
    adapt(base, tmp_path / "adapter", tmp_path / "merged", layout, rows, options)
    theirs, was = read_model(tmp_path / "merged"), read_model(base)
    numbers: Options = {"alpha": 0, "drop": 0, "dtype": "float32"}
    with pytest.raises(MismatchError, match=rf"\[96, 32\].*\[{rows}, 32\].*--vocab base or --vocab sft"):
        merge_checkpoints(base, tmp_path / "adapter", tmp_path / "no", **numbers)
    for vocab, size in (("sft", rows), ("base", 96)):
        merge_checkpoints(base, tmp_path / "adapter", tmp_path / f"out-{vocab}", vocab=vocab, **numbers, verify=True)
        ours = read_model(tmp_path / f"out-{vocab}")
        for name in ours:
            expected = theirs.get(name, theirs[EMBED]).float()
            if name in ENDS:
                common = min(rows, 96)
                rest = expected[common:] if vocab == "sft" else was.get(name, was[EMBED])[common:].float()
                expected = torch.cat([expected[:common], rest])
            torch.testing.assert_close(ours[name], expected, rtol=2e-6, atol=2e-7)
        assert config_of(tmp_path / f"out-{vocab}")["vocab_size"] == size == ours[EMBED].shape[0]
        load(tmp_path / f"out-{vocab}", layout)


@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_an_adapter_on_a_start_that_was_resized(resized: tuple[str, Path], tmp_path: Path, vocab: str) -> None:
    """The second round of a loop: what the adapter leaves alone is as in the start, its rows too."""
    layout, folder = resized
    begin = tmp_path / "start"
    merge_checkpoints(folder / "base", folder / "sft", begin, vocab="sft", drop=0.5)
    adapt(begin, tmp_path / "adapter", tmp_path / "merged", layout, 100, {"target_modules": ["q_proj"]})
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "lora_" in name}, path)
    merge_checkpoints(folder / "base", tmp_path / "adapter", tmp_path / "out", start=begin, vocab=vocab, drop=0)
    base, start, out = map(read_model, (folder / "base", begin, tmp_path / "out"))
    for name in set(ENDS) & set(base):
        expected = reference.merge_tensors(
            base[name], start[name][:96], None, torch.bfloat16, name=name, alpha=0.5, drop=0
        )
        assert same_bits(out[name], torch.cat([expected, start[name][96:]]) if vocab == "sft" else expected)
    load(tmp_path / "out", layout)
    verify(tmp_path / "out")


# --- bits


@given(
    rows=st.tuples(*(st.integers(1, 40) for _ in range(3))), columns=st.integers(1, 40), alpha=strategies.alphas,
    drop=strategies.drops, dtypes=st.tuples(*(st.sampled_from(strategies.WIDER) for _ in range(3))),
    out=st.sampled_from([None, "float32", "bfloat16"]), vocab=st.sampled_from(["base", "sft"]), started=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_common_rows_are_merged_as_without_the_others_which_keep_every_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: tuple[int, ...], columns: int, alpha: float, drop: float,
    dtypes: tuple[torch.dtype, ...], out: str | None, vocab: str, started: bool, seed: int,
) -> None:  # fmt: skip
    """Minus zeros, subnormals, and what is not finite among the rest; for any numbers, dtypes and sizes."""
    folder = tmp_path_factory.mktemp("bits")
    roles = ("base", "sft", "start") if started else ("base", "sft")
    sides: dict[str, Tensor] = {}
    common = min(rows[: len(roles)])
    for number, (role, count, dtype) in enumerate(zip(roles, rows, dtypes, strict=False)):
        gauss = strategies.tensor(count * columns, dtype, seed=seed + number, kind="gauss", specials=False)
        edges = strategies.tensor(count * columns, torch.bfloat16, seed=seed - number, kind="edges", specials=True)
        zeros = strategies.tensor(count * columns, dtype, seed=number, kind="gauss", specials=False) * -0.0
        tensor = torch.where(torch.arange(count * columns) % 3 == 0, zeros, gauss)
        tensor[common * columns :: 2] = edges[common * columns :: 2].to(dtype)
        sides[role] = tensor.view(count, columns)
        write_model(folder / role, {EMBED: sides[role]})
    written = sides["base"].dtype if out is None else {"float32": torch.float32, "bfloat16": torch.bfloat16}[out]
    wide = np.float64 if sides[vocab].dtype == torch.float64 else np.float32
    given_rest = reference.widen(reference.to_array(sides[vocab][common:]), wide)
    rest = reference.to_tensor(reference.narrow(given_rest, written), written, (-1, columns))
    options: Options = {"start": folder / "start", "iteration": 0} if started else {}
    merged = iter_merged(
        folder / "base", folder / "sft", vocab=vocab, alpha=alpha, drop=drop, dtype=out, allow_nonfinite=True, **options
    )
    if not np.array_equal(np.isfinite(given_rest), rest.isfinite().reshape(-1).numpy()):
        with pytest.raises(NonFiniteError, match="too large for the output dtype"):
            list(merged)
        return
    found = dict(merged)[EMBED]
    expected = reference.merge_tensors(
        sides["base"][:common], sides["sft"][:common], sides["start"][:common] if started else None, written,
        name=EMBED, alpha=alpha, drop=drop,
    )  # fmt: skip
    assert same_bits(found[:common], expected)
    assert same_bits(found[common:], rest)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of several pieces, of which none ends where the rows do."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder / "base", random_state({EMBED: (301, 50), "w": (70, 50)}, seed=1))
    write_model(folder / "sft", random_state({EMBED: (333, 50), "w": (70, 50)}, seed=2, dtype=torch.float32))
    return folder


@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_any_pieces_any_workers_and_the_path_of_gpus_give_the_same_bytes(
    wide: Path, tmp_path: Path, vocab: str
) -> None:
    from mergekit_imm import execute, gpu

    given = wide / "base", wide / "sft"
    one = merge_checkpoints(*given, tmp_path / "one", vocab=vocab, workers=1)
    with patch("mergekit_imm.execute.BUFFER", 16 * 4096), patch("mergekit_imm.plan.RECORD", 1024):
        merge_checkpoints(*given, tmp_path / "pieces", vocab=vocab, workers=3, verify=True)
    device = execute.Device(gpu.merge_span_on("cpu"), gpu.buffer)
    with patch("mergekit_imm.merge.pick_device", lambda _: device):
        merge_checkpoints(*given, tmp_path / "gpu", vocab=vocab)
    expected = files_of(tmp_path / "one")
    assert files_of(tmp_path / "gpu") == expected
    assert files_of(tmp_path / "pieces")["model.safetensors"] == expected["model.safetensors"]
    stored = 2 * 301 * 50 + 2 * 70 * 50 + 4 * (333 if vocab == "sft" else 301) * 50 + 4 * 70 * 50
    assert one.bytes_read == stored


def test_a_sweep_reads_the_rest_once_and_writes_it_everywhere(wide: Path, tmp_path: Path) -> None:
    given = wide / "base", wide / "sft"
    merge_checkpoints(*given, tmp_path / "{alpha}", vocab="sft", alpha=[0.0, 0.3, 1.0])
    sft = read_model(wide / "sft")[EMBED]
    for alpha in (0.0, 0.3, 1.0):
        merge_checkpoints(*given, tmp_path / "alone", vocab="sft", alpha=alpha, overwrite=True)
        swept = read_model(tmp_path / str(alpha))[EMBED]
        assert same_bits(swept, read_model(tmp_path / "alone")[EMBED])
        assert same_bits(swept[301:], sft[301:].bfloat16())


def test_what_is_not_finite_is_refused_in_any_row(wide: Path, tmp_path: Path) -> None:
    state = read_model(wide / "sft")
    state[EMBED][320, 7] = torch.inf
    write_model(tmp_path / "sft", state)
    with pytest.raises(MergeError, match=rf"{EMBED}' of sft .* has 1 NaN or infinite of 16650 elements.* index 16007"):
        merge_checkpoints(wide / "base", tmp_path / "sft", tmp_path / "out", vocab="sft")
    merge_checkpoints(wide / "base", tmp_path / "sft", tmp_path / "out", vocab="base")
    merge_checkpoints(wide / "base", tmp_path / "sft", tmp_path / "inf", vocab="sft", allow_nonfinite=True)
    assert read_model(tmp_path / "inf")[EMBED][320, 7] == torch.inf


# --- the files beside the weights


@pytest.mark.parametrize("rows", [96, 100])
def test_with_the_base_s_vocabulary_all_other_files_are_the_base_s(
    resized: tuple[str, Path], tmp_path: Path, rows: int
) -> None:
    _, folder = resized
    shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copytree(folder / ("sft" if rows == 100 else "base"), tmp_path / "sft")
    for role in ("base", "sft"):
        (tmp_path / role / "chat_template.jinja").write_text(f"{{{{ {role} }}}}")
    (tmp_path / "sft" / "special.json").write_text("{}")
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", vocab="base")
    assert set(report.side_files) == {"base"}
    assert {"special.json", "tokenizer.json", "config.json", "generation_config.json"} <= {*report.left_out["sft"]}
    out, base = files_of(tmp_path / "out"), files_of(tmp_path / "base")
    others = set(base) - {name for name in base if name.startswith("model")}
    assert {name: out[name] for name in others} == {name: base[name] for name in others}
    assert "special.json" not in out
    assert report.config_changes == {}


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
    assert "has no embedding by a name that is known" in report.notes[0]


def test_embeddings_that_were_not_resized_alike_are_refused(tmp_path: Path) -> None:
    given = tmp_path / "base", tmp_path / "sft"
    write_model(given[0], random_state({EMBED: (8, 4), HEAD: (8, 4)}))
    for head in (8, 10):
        write_model(given[1], random_state({EMBED: (9, 4), HEAD: (head, 4)}))
        for vocab in ("base", "sft"):
            with pytest.raises(MismatchError, match=rf"have \[8\] and \[{min(head, 9)}, {max(head, 9)}\] rows"):
                merge_checkpoints(*given, tmp_path / "out", vocab=vocab)


@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_factors_of_fewer_rows_than_the_base_has(tmp_path: Path, vocab: str) -> None:
    """An adapter on a start whose embedding was cut; the base's rows behind it are not a delta."""
    model = new_model("llama")
    base = save(model, tmp_path / "base")
    begin = save(resize(fine_tuned(model, seed=4), 90), tmp_path / "start")
    adapt(begin, tmp_path / "adapter", tmp_path / "merged", "llama", 90, {"target_modules": ["embed_tokens"]})
    merge_checkpoints(
        base, tmp_path / "adapter", tmp_path / "out", start=begin, iteration=1, vocab=vocab, alpha=0, drop=0,
        dtype="float32",
    )  # fmt: skip
    merged, theirs = read_model(tmp_path / "out"), read_model(tmp_path / "merged")
    for name in ENDS:
        torch.testing.assert_close(merged[name][:90], theirs[name].float(), rtol=2e-6, atol=2e-7)
        rest = read_model(base)[name][90:].float() if vocab == "base" else merged[name][:0]
        assert same_bits(merged[name][90:], rest)


def test_factors_of_rows_that_the_base_lacks_are_refused(resized: tuple[str, Path], tmp_path: Path) -> None:
    layout, folder = resized
    options: Options = {"target_modules": ["embed_tokens"]}
    adapt(folder / "sft", tmp_path / "adapter", tmp_path / "merged", layout, 100, options)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "lora_" in name}, path)
    given = (folder / "base", tmp_path / "adapter")
    both: Options = {"start": folder / "sft", "iteration": 1}
    with pytest.raises(CheckpointError, match=r"changes tensor .* by factors, also rows that base .*merge it first"):
        merge_checkpoints(*given, tmp_path / "out", vocab="sft", **both)
    merge_checkpoints(*given, tmp_path / "out", vocab="base", **both, alpha=0, drop=0, dtype="float32")
    merged, theirs = read_model(tmp_path / "out")[EMBED], read_model(tmp_path / "merged")[EMBED]
    torch.testing.assert_close(merged, theirs[:96].float(), rtol=2e-6, atol=2e-7)
