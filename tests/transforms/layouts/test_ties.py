"""One tensor or two: heads that are tied to embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import random_state, read_model, same_bits, write_model
from loading import (
    EMBED,
    HEAD,
    TIED,
    Tied,
    assert_index_is_right,
    assert_same_bits,
    config_of,
    stored,
)
from mergekit_imm import dare_merge, merge_checkpoints
from models import LAYOUTS, load, new_model, save, untied

FORMS = [
    (base, sft, start)
    for base in ("embedding", "both")
    for sft in ("embedding", "both", "head")
    for start in (None, "embedding", "both", "head")
]


@pytest.mark.parametrize(("base_form", "sft_form", "start_form"), FORMS)
def test_a_tied_tensor_is_one_tensor_by_whatever_names_the_files_hold_it(
    tied: Tied, tmp_path: Path, base_form: str, sft_form: str, start_form: str | None
) -> None:
    base, _ = tied.write("base", base_form, tmp_path)
    sft, _ = tied.write("sft", sft_form, tmp_path)
    start = tied.write("start", start_form, tmp_path)[0] if start_form else None
    report = merge_checkpoints(base, sft, tmp_path / "out", start=start, drop=0.5, iteration=1 if start else 0)

    one = {role: stored(state, "embedding") for role, state in tied.states.items()}
    expected = dare_merge(
        one["base"], one["sft"], start=one["start"] if start else None, drop=0.5, iteration=1 if start else 0
    )
    if base_form == "both":
        expected[HEAD] = expected[EMBED]
    assert_same_bits(read_model(tmp_path / "out"), expected)
    assert_index_is_right(tmp_path / "out")
    assert report.notes == []
    assert report.tensors["merged"] == len(one["base"])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    model = load(tmp_path / "out", "qwen2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same_bits(model.get_input_embeddings().weight.detach(), expected[EMBED])


@pytest.mark.parametrize(
    ("base_form", "sft_form", "start_form", "blamed"),
    [
        ("embedding", "apart", None, "sft"),
        ("both", "apart", None, "sft"),
        ("apart", "apart", None, "base"),
        ("apart", "both", None, "base"),
        ("embedding", "apart", "embedding", "sft"),
        ("embedding", "apart", "head", "sft"),
        ("both", "apart", "both", "sft"),
        ("both", "apart", "apart", "sft"),
        ("embedding", "both", "apart", "start"),
        ("apart", "embedding", "head", "base"),
    ],
)
def test_a_tie_that_an_input_breaks_is_merged_as_two_tensors_and_said(
    tied: Tied, tmp_path: Path, base_form: str, sft_form: str, start_form: str | None, blamed: str
) -> None:
    forms = {"base": base_form, "sft": sft_form} | ({"start": start_form} if start_form else {})
    folders, states = {}, {}
    for role, form in forms.items():
        folders[role], states[role] = tied.write(role, form, tmp_path)
    out = tmp_path / "out"
    iteration = 1 if start_form else 0
    report = merge_checkpoints(
        folders["base"], folders["sft"], out, start=folders.get("start"), drop=0.5, iteration=iteration
    )

    def side(role: str, name: str) -> Tensor:
        other = EMBED if name == HEAD else HEAD
        return states[role][name] if name in states[role] else states[role][other]

    expected = {
        name: dare_merge(
            side("base", name),
            side("sft", name),
            start=side("start", name) if start_form else None,
            drop=0.5,
            name=name,
            iteration=iteration,
        )
        for name in tied.states["base"]
    }
    assert_same_bits(read_model(out), expected)
    assert_index_is_right(out)
    assert config_of(out)["tie_word_embeddings"] is False
    assert report.config_changes == {"tie_word_embeddings": False}
    (note,) = report.notes
    assert note.startswith(f"note: {blamed} ")
    assert ("its config ties them" in note) == (blamed == "base")
    assert all(word in note for word in (EMBED, HEAD, "under their own names", "untied"))
    model = load(out, "qwen2")
    assert same_bits(model.get_input_embeddings().weight.detach(), expected[EMBED])
    assert same_bits(model.get_output_embeddings().weight.detach(), expected[HEAD])


def test_equal_ends_are_written_tied_though_the_sft_says_untied(tied: Tied, tmp_path: Path) -> None:
    base, _ = tied.write("base", "embedding", tmp_path)
    sft, _ = tied.write("sft", "both", tmp_path)
    (sft / "config.json").write_text(json.dumps(tied.config | {"tie_word_embeddings": False}))
    report = merge_checkpoints(base, sft, tmp_path / "out")
    assert report.config_changes == {"tie_word_embeddings": True}
    model = load(tmp_path / "out", "qwen2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_mask_of_a_tied_tensor_does_not_depend_on_the_names_in_the_sft(tied: Tied, tmp_path: Path) -> None:
    base, _ = tied.write("base", "head", tmp_path)
    merged = []
    for form in ("head", "embedding"):
        sft, _ = tied.write("sft", form, tmp_path / form)
        merge_checkpoints(base, sft, tmp_path / form / "out", drop=0.5)
        merged.append(read_model(tmp_path / form / "out"))
        load(tmp_path / form / "out", "qwen2")
    assert_same_bits(*merged)


@pytest.mark.parametrize("head", [[], [HEAD]], ids=["no head stored", "a head stored"])
def test_an_encoder_s_and_a_decoder_s_embedding_are_two_tensors_and_break_no_tie(
    tmp_path: Path, head: list[str]
) -> None:
    """As in Marian without shared embeddings: the head is tied to the decoder's."""
    encoder, decoder = (f"model.{part}.embed_tokens.weight" for part in ("encoder", "decoder"))
    base = random_state({encoder: (8, 64), decoder: (8, 64)})
    sft = {name: tensor + torch.ones_like(tensor) for name, tensor in base.items()}
    config = {"model_type": "marian", "dtype": "bfloat16", "tie_word_embeddings": True}
    base_folder, sft_folder = (
        write_model(tmp_path / role, state | {name: state[decoder].clone() for name in head}, config=config)
        for role, state in (("base", base), ("sft", sft))
    )
    report = merge_checkpoints(base_folder, sft_folder, tmp_path / "out", drop=0.5)
    expected = dare_merge(base, sft, drop=0.5)
    assert_same_bits(read_model(tmp_path / "out"), expected | dict.fromkeys(head, expected[decoder]))
    assert report.notes == []
    assert config_of(tmp_path / "out") == config


def test_ends_that_differ_are_no_broken_tie_where_the_config_does_not_speak_of_one(tmp_path: Path) -> None:
    state = random_state({EMBED: (8, 64), HEAD: (8, 64)})
    tuned = {name: tensor + torch.ones_like(tensor) for name, tensor in state.items()}
    config = {"model_type": "inkling", "dtype": "bfloat16"}
    folders = [write_model(tmp_path / str(i), each, config=config) for i, each in enumerate((state, tuned))]
    report = merge_checkpoints(folders[0], folders[1], tmp_path / "out", drop=0.5)
    assert report.notes == []
    assert report.config_changes == {}
    assert_same_bits(read_model(tmp_path / "out"), dare_merge(state, tuned, drop=0.5))


def test_the_ends_of_different_sub_models_are_not_tied_to_each_other(tmp_path: Path) -> None:
    names = ["expert.lm_head.weight", "vision.model.embed_tokens.weight"]
    state = random_state(dict.fromkeys(names, (8, 64)))
    tuned = {name: tensor + torch.ones_like(tensor) for name, tensor in state.items()}
    config = {"model_type": "pi0", "dtype": "bfloat16", "tie_word_embeddings": True}
    folders = [write_model(tmp_path / str(i), each, config=config) for i, each in enumerate((state, tuned))]
    report = merge_checkpoints(folders[0], folders[1], tmp_path / "out", drop=0.5)
    assert report.notes == []
    assert report.config_changes == {}


@pytest.mark.parametrize("says", ["untied", "tied"])
@pytest.mark.parametrize("layout", TIED)
def test_a_head_trained_on_its_own_stays_one_in_every_layout(layout: str, tmp_path: Path, says: str) -> None:
    model = new_model(layout)
    base = save(model, tmp_path / "base", "base")
    sft = save(untied(model, seed=3), tmp_path / "sft", "sft")
    if says == "tied":
        (sft / "config.json").write_text((base / "config.json").read_text())
    report = merge_checkpoints(base, sft, tmp_path / "out", drop=0.5)
    assert len(report.notes) == 1
    merged, states = read_model(tmp_path / "out"), {"base": read_model(base), "sft": read_model(sft)}
    embedding = LAYOUTS[layout].embedding
    (head,) = set(merged) - set(states["base"])
    expected = dare_merge(states["base"][embedding], states["sft"][head], drop=0.5, name=head)
    assert same_bits(merged[head], expected)
    loaded = load(tmp_path / "out", layout)
    assert same_bits(loaded.get_output_embeddings().weight.detach(), expected)
    assert same_bits(loaded.get_input_embeddings().weight.detach(), merged[embedding])
    config = config_of(tmp_path / "out")
    assert {level["tie_word_embeddings"] for level in (config, config.get("text_config", config))} == {False}
