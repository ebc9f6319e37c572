"""Adapters with resized embeddings, or trained on a start of another size."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import reference
from checkpoints import read_model, same_bits
from loading import EMBED, config_of
from mergekit_imm import CheckpointError, MismatchError, merge_checkpoints, verify
from models import LAYOUTS, fine_tuned, load, new_model
from vocabularies import ENDS, Options, resize, save

RESIZED: dict[str, tuple[str, Options]] = {
    "llama": ("llama", {"target_modules": ["q_proj"]}),
    "tied": ("qwen2", {"target_modules": ["q_proj"]}),
    "trained": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, trained": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 89]}),
    "tied, tokens": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [89, 3]}),
}


def adapt(base: Path, adapter: Path, merged: Path, layout: str, rows: int, options: Options) -> None:
    """Train an adapter on a model with resized embeddings, and merge it with PEFT."""
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
    """With alpha 0 and no drop the result is PEFT's own merge, resized if the base's vocabulary is chosen."""
    layout, options = RESIZED[kind]
    if rows == 100 and "trainable_token_indices" in options:
        options = {**options, "trainable_token_indices": [97, 3, 99]}
    model = new_model(layout)
    model.config.tie_word_embeddings = LAYOUTS[layout].tied
    base = save(model, tmp_path / "base")
    adapt(base, tmp_path / "adapter", tmp_path / "merged", layout, rows, options)
    theirs, was = read_model(tmp_path / "merged"), read_model(base)
    numbers: Options = {"alpha": 0, "drop": 0, "dtype": "float32"}
    with pytest.raises(MismatchError, match=rf"\[96, 32\].*\[{rows}, 32\].*vocab=\"base\" or vocab=\"sft\""):
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
    """The second round of a loop: what the adapter does not change is that of the start, rows included."""
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


@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_factors_of_fewer_rows_than_the_base_has(tmp_path: Path, vocab: str) -> None:
    """An adapter on a start with fewer rows; the base's further rows are not a delta."""
    model = new_model("llama")
    base = save(model, tmp_path / "base")
    begin = save(resize(fine_tuned(model, seed=4), 90), tmp_path / "start")
    adapt(begin, tmp_path / "adapter", tmp_path / "merged", "llama", 90, {"target_modules": ["embed_tokens"]})
    merge_checkpoints(
        base,
        tmp_path / "adapter",
        tmp_path / "out",
        start=begin,
        iteration=1,
        vocab=vocab,
        alpha=0,
        drop=0,
        dtype="float32",
    )
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
    with pytest.raises(
        CheckpointError, match=r"has factors for tensor .*, which also change rows that base .*merge it first"
    ):
        merge_checkpoints(*given, tmp_path / "out", vocab="sft", **both)
    merge_checkpoints(*given, tmp_path / "out", vocab="base", **both, alpha=0, drop=0, dtype="float32")
    merged, theirs = read_model(tmp_path / "out")[EMBED], read_model(tmp_path / "merged")[EMBED]
    torch.testing.assert_close(merged, theirs[:96].float(), rtol=2e-6, atol=2e-7)
