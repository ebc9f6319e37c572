"""Heads of encoders and encoder-decoders, tied to the embedding under various names; loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from checkpoints import read_model, same_bits
from encoders import ENCODERS, SMALL
from loading import config_of
from mergekit_imm import merge_checkpoints, merge_into, merged_stream
from reference import merge_tensors


def new(kind: str, seed: int = 0) -> Any:
    """A model, or with a seed one fine-tuned from it."""
    torch.manual_seed(0)
    model = ENCODERS[kind]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def write(model: Any, folder: Path, form: str) -> Path:
    """Save a model with each tied tensor once, like transformers, or under every name, like torch.save."""
    model.save_pretrained(folder)
    if form == "every name":
        (folder / "model.safetensors").unlink()
        torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    return folder


def ties(model: Any) -> list[list[str]]:
    """The names of a live model that share one tensor."""
    found: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(tensor.data_ptr(), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def assert_is_the_average(out: Path, kind: str) -> None:
    base, sft = new(kind).state_dict(), new(kind, 1).state_dict()
    model, info = type(new(kind)).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded: dict[str, Tensor] = model.state_dict()
    wrong = [n for n in base if base[n].is_floating_point() and not torch.allclose(loaded[n], (base[n] + sft[n]) / 2)]
    assert wrong == []
    assert ties(model) == ties(new(kind))


@pytest.mark.parametrize("base_form", ["once", "every name"])
@pytest.mark.parametrize("sft_form", ["once", "every name"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_heads_by_any_name_are_one_tensor_with_the_embedding(
    tmp_path: Path, kind: str, base_form: str, sft_form: str
) -> None:
    base, sft = write(new(kind), tmp_path / "base", base_form), write(new(kind, 1), tmp_path / "sft", sft_form)
    report = merge_checkpoints(base, sft, tmp_path / "out", drop=0)
    assert [note for note in report.notes if "position_ids" not in note] == []
    assert_is_the_average(tmp_path / "out", kind)
    # One mask: tied names stay equal after dropping.
    merge_checkpoints(base, sft, tmp_path / "dropped", drop=0.5)
    written = read_model(tmp_path / "dropped")
    for names in ties(new(kind)):
        held = [written[name] for name in names if name in written]
        assert held
        assert all(same_bits(held[0], other) for other in held)


@pytest.mark.parametrize("form", ["every name", "once"])
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_live_model_is_merged_as_its_file_is(tmp_path: Path, kind: str, form: str) -> None:
    base = write(new(kind), tmp_path / "base", form)
    sft = write(new(kind, 1), tmp_path / "sft", "once")
    merge_checkpoints(base, sft, tmp_path / "out", drop=0.5)
    model = new(kind, 1)
    expected = read_model(tmp_path / "out")
    state = model.state_dict()
    for names in ([*state], [*reversed(state)], [name for name, _ in model.named_parameters()]):
        names += [name for name in expected if name in state and "position_ids" in name and name not in names]
        streamed = dict(merged_stream(((name, state[name]) for name in names), base, drop=0.5))
        assert sorted(streamed) == sorted(expected)
        assert [name for name in expected if not same_bits(streamed[name], expected[name])] == []
    merge_into(model, base, drop=0.5)
    loaded = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert [name for name, tensor in model.state_dict().items() if not same_bits(tensor, loaded[name])] == []


def test_the_mask_is_keyed_by_the_embedding_whatever_is_stored(tmp_path: Path) -> None:
    base, sft = write(new("bert"), tmp_path / "base", "every name"), write(new("bert", 1), tmp_path / "sft", "once")
    merge_checkpoints(base, sft, tmp_path / "out", drop=0.5)
    name = "bert.embeddings.word_embeddings.weight"
    expected = merge_tensors(
        new("bert").state_dict()[name],
        new("bert", 1).state_dict()[name],
        None,
        torch.float32,
        alpha=0.5,
        drop=0.5,
        name=name,
    )
    written = read_model(tmp_path / "out")
    assert same_bits(written[name], expected)
    assert same_bits(written["cls.predictions.decoder.weight"], expected)


def test_a_head_that_was_trained_apart_is_written_and_said(tmp_path: Path) -> None:
    base = write(new("bert"), tmp_path / "base", "once")
    apart = new("bert", 1)
    apart.cls.predictions.decoder.weight = nn.Parameter(apart.cls.predictions.decoder.weight.detach() + 1)
    apart.config.tie_word_embeddings = False
    sft = write(apart, tmp_path / "sft", "every name")
    (note,) = merge_checkpoints(base, sft, tmp_path / "out", drop=0).notes
    assert "config.json says untied" in note
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    model, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    half = (new("bert").state_dict()["cls.predictions.decoder.weight"] + apart.cls.predictions.decoder.weight) / 2
    assert torch.allclose(model.cls.predictions.decoder.weight, half)


def test_equal_tensors_of_an_untied_model_are_two(tmp_path: Path) -> None:
    """A head initialised as a copy of the embedding, in a model with an untied config."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 2}, tie_word_embeddings=False)
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "sft")
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    assert report.notes == []
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    base, sft = read_model(tmp_path / "base"), read_model(tmp_path / "sft")
    for name, tensor in read_model(tmp_path / "out").items():
        expected = merge_tensors(base[name], sft[name], None, torch.float32, alpha=0.5, drop=0.5, name=name)
        assert same_bits(tensor, expected)
