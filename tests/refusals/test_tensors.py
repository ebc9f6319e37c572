"""Refusals by tensor names, shapes and dtypes."""

from __future__ import annotations

import re

import pytest
import torch

from checkpoints import random_state, same_bits, write_model
from mergekit_imm.errors import CheckpointError, MismatchError
from refused import (
    CONFIG,
    HEAD,
    MODEL,
    NORM,
    SHAPES,
    STEPS,
    UP0,
    UP1,
    Models,
    shown_options,
    write_zeros,
)


def test_a_tensor_that_only_base_has_is_refused_with_the_closest_name(models: Models) -> None:
    models.change("sft", {UP1: None, "model.layers.1.mlp.up_prj.weight": torch.zeros(8, 8)})
    match = rf"base \S+base only, not in sft \S+sft: '{re.escape(UP1)}' .*up_prj\.weight'.*the same, --rename"
    models.refused(MismatchError, match)


def test_a_tensor_that_only_sft_has_is_refused_with_the_closest_name(models: Models) -> None:
    models.change("sft", {"model.layers.1.mlp.up_prj.weight": torch.zeros(8, 8)})
    match = rf"sft \S+sft only, not in base \S+base: 'model.*up_prj\.weight' .*{re.escape(UP1)}.*--take"
    models.refused(MismatchError, match)


NAMES = [
    "score.weight",
    "a.w(1)[2]+*?^$|{3}.weight",
    "it's",
    'a "b"',
    "C:\\weights",
    "two words",
    "gewicht.ü.权重",
    "line\nbreak",
    "\x1b[2Jescape",
    "-dash",
    "long." * 24 + "weight",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("role", "option"), [("base", "keep"), ("sft", "take")])
def test_the_option_that_a_refused_name_comes_with_works_as_it_is_shown(
    models: Models, name: str, role: str, option: str
) -> None:
    extra = torch.arange(4, dtype=torch.bfloat16)
    models.change(role, {name: extra})
    shown = shown_options(models.refused(MismatchError, f"only.*--{option}"))
    assert [list(each) for each in shown] == [[option]]
    report = models.merge(**shown[0])
    assert report.tensors[{"keep": "kept", "take": "taken"}[option]] == 1
    assert same_bits(models.merged()[name], extra)


def test_options_shown_for_many_names_let_through_no_other_tensor(models: Models) -> None:
    models.change("base", {f"extra.{i}": torch.zeros(4) for i in range(7)})
    keep: list[str] = []
    for _ in range(7):
        shown = shown_options(models.refused(MismatchError, r"(\d+) tensors are in base", keep=keep))
        keep += shown[0]["keep"]
        if all(any(re.search(pattern, f"extra.{i}") for pattern in keep) for i in range(7)):
            break
    report = models.merge(keep=keep)
    assert (report.tensors["kept"], report.tensors["merged"]) == (7, len(SHAPES))


def test_a_tensor_that_start_lacks_or_has_alone_is_refused(models: Models) -> None:
    start = write_model(models.folder / "start", random_state({k: v for k, v in SHAPES.items() if k != NORM}))
    models.refused(MismatchError, rf"{NORM}.*--keep", start=start, iteration=1)
    write_model(start, random_state({**SHAPES, "extra": (2,)}))
    models.refused(MismatchError, r"start \S+start only, not in base .*'extra'", start=start, iteration=1)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((4, 8), rf"{re.escape(UP0)}.*BF16 \[8, 8\].*base.*BF16 \[4, 8\].*sft.*shapes must be equal.*--keep"),
        ((64,), r"BF16 \[8, 8\].*BF16 \[64\].*--keep"),
        ((8, 8, 1), r"BF16 \[8, 8\].*BF16 \[8, 8, 1\].*--keep"),
        ((0,), r"BF16 \[8, 8\].*BF16 \[0\].*empty.*ZeRO-3.*save"),
    ],
)
def test_different_shapes_are_refused(models: Models, shape: tuple[int, ...], match: str) -> None:
    models.change("sft", {UP0: torch.zeros(shape, dtype=torch.bfloat16)})
    models.refused(MismatchError, match)
    report = models.merge(keep=[f"^{re.escape(UP0)}$"])
    assert report.tensors["kept"] == 1


def test_an_empty_tensor_of_the_base_against_a_full_one_is_refused(models: Models) -> None:
    models.change("base", {UP0: torch.zeros(0, dtype=torch.bfloat16)})
    models.refused(MismatchError, r"BF16 \[0\].*base.*BF16 \[8, 8\].*ZeRO-3")


def test_tensors_that_are_empty_in_all_inputs_are_no_error(models: Models) -> None:
    for role in ("base", "sft"):
        models.change(role, {UP0: torch.zeros(0, 8, dtype=torch.bfloat16)})
    assert models.merge().status == "merged"
    assert models.merged()[UP0].shape == (0, 8)


def test_different_vocabularies_are_refused_as_such(models: Models) -> None:
    models.change("sft", {HEAD: torch.zeros(40, 8, dtype=torch.bfloat16)})
    models.refused(MismatchError, rf"{HEAD}.*\[32, 8\].*\[40, 8\].*vocabular.*--vocab base or --vocab sft")


@pytest.mark.parametrize(
    ("one", "other"),
    [("I64", "BF16"), ("BF16", "I64"), ("I64", "I32"), ("U8", "BOOL"), ("I8", "U8"), ("F32", "BOOL")],
)
def test_kinds_of_dtype_that_differ_are_refused_and_the_option_shown_works(
    models: Models, one: str, other: str
) -> None:
    for role, dtype in (("base", one), ("sft", other)):
        write_zeros(getattr(models, role) / MODEL, {STEPS: (dtype, (3,)), NORM: ("BF16", (8,))})
    message = models.refused(
        MismatchError, rf"'{STEPS}' is {one} \[3\] in base .* and {other} \[3\] in sft .*integers.*--keep"
    )
    assert models.merge(**shown_options(message)[0]).tensors["kept"] == 1


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64"])
@pytest.mark.parametrize("role", ["base", "sft"])
def test_quantised_and_complex_tensors_are_refused_unless_kept_or_taken(models: Models, role: str, dtype: str) -> None:
    write_zeros(models.base / MODEL, {UP0: ("BF16", (4,)), NORM: ("BF16", (8,))})
    write_zeros(models.sft / MODEL, {UP0: ("BF16", (4,)), NORM: ("BF16", (8,))})
    write_zeros(getattr(models, role) / MODEL, {UP0: (dtype, (4,)), NORM: ("BF16", (8,))})
    match = rf"{re.escape(UP0)}' is {dtype} in {role} .*not merged.*unquantised.*"
    (option,) = shown_options(models.refused(CheckpointError, match))
    assert list(option) == [{"base": "take", "sft": "keep"}[role]]  # the option for the other side
    assert models.merge(**option).tensors["merged"] == 1


@pytest.mark.parametrize("role", ["base", "sft"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_models_are_refused(models: Models, role: str, key: str) -> None:
    models.change(role, {}, {**CONFIG, key: {"quant_method": "awq"}})
    models.refused(CheckpointError, f"{role} .*is quantised.*config.json has a {key} of awq.*merge the unquantised")


@pytest.mark.parametrize("key", ["model_type", "architectures"])
@pytest.mark.parametrize("other", ["other", None])
def test_different_architectures_are_refused(models: Models, key: str, other: str | None) -> None:
    models.change("sft", {}, {**CONFIG, key: other})
    models.refused(MismatchError, rf"base .* has {key} .*[tT]iny.*sft .* has {other or 'none'}.*one architecture")


def test_the_architecture_of_start_counts_too(models: Models) -> None:
    start = write_model(models.folder / "start", random_state(SHAPES), config={**CONFIG, "model_type": "other"})
    models.refused(MismatchError, "start .* has other", start=start, iteration=1)
