"""Refusals by tensor values: NaN, infinity, overflow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from checkpoints import files_of, random_state, read_model, same_bits, write_model
from mergekit_imm import iter_merged
from mergekit_imm.common.messages import for_caller
from mergekit_imm.errors import (
    ArgumentError,
    CheckpointError,
    MergeError,
    MismatchError,
    NonFiniteError,
    OutputError,
)
from mergekit_imm.output import direct_io
from refused import (
    BITS,
    INDEX,
    MODEL,
    NORM,
    SHAPES,
    SIDE,
    STEPS,
    UP0,
    UP1,
    Models,
    everything,
    from_bits,
    sharded,
    shown_options,
)


def test_an_input_that_is_cut_off_during_the_merge_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(descriptor: int, size: int) -> None:
        with (models.sft / MODEL).open("r+b") as file:
            file.truncate(1000)

    monkeypatch.setattr(direct_io, "allocate", cut)
    with pytest.raises(CheckpointError, match=rf"sft/{MODEL} ended at byte 1000: it was changed or cut off during"):
        models.merge()
    assert not models.out.exists()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("role", ["base", "sft", "start"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(NAN, torch.bfloat16), (INF, torch.bfloat16), (-INF, torch.float16), (NAN, torch.float32), (INF, torch.float64)],
)
def test_values_that_are_not_finite_are_refused(models: Models, role: str, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(8, 8, dtype=dtype)
    bad.view(-1)[[5, 40]] = value
    start = models.folder / "start"
    for each in ("base", "sft", "start"):
        state = {UP0: bad if each == role else torch.ones(8, 8, dtype=dtype), UP1: torch.ones(8, 8, dtype=dtype)}
        write_model(models.folder / each, state)
    models.refused(
        NonFiniteError,
        rf"'{re.escape(UP0)}' of {role} \S+{role} has 2 NaN or infinite of 64 elements, the first at"
        r" index 5; .*--allow-nonfinite.*--(keep|take) '",
        streaming=True,
        start=start,
        iteration=1,
    )


@pytest.mark.parametrize(("alpha", "drop"), [(1.0, 0.5), (0.0, 0.5), (0.5, 0.99999), (0.5, 0.0)])
@pytest.mark.parametrize("role", ["base", "sft"])
def test_values_that_are_not_finite_are_refused_even_where_they_do_not_count(
    models: Models, role: str, alpha: float, drop: float
) -> None:
    models.change(role, {NORM: torch.full((8,), torch.nan, dtype=torch.bfloat16)})
    models.refused(NonFiniteError, f"{NORM}.* 8 NaN", streaming=True, alpha=alpha, drop=drop)


def test_the_same_value_is_refused_whatever_the_number_of_workers(models: Models) -> None:
    for role in ("base", "sft"):
        state = {f"w.{i}": torch.zeros(1 << 21, dtype=torch.bfloat16) for i in range(4)}
        if role == "sft":
            state["w.1"][[1_500_000, 1_600_000]] = torch.inf
            state["w.2"][0] = torch.nan
            state["w.3"][7] = torch.nan
        write_model(getattr(models, role), state)
    match = r"'w\.1' of sft .* has 2 NaN or infinite of 2097152 elements, the first at index 1500000"
    messages = {models.refused(NonFiniteError, match, streaming=True, workers=workers) for workers in (1, 2, 4, 4, 9)}
    assert len(messages) == 1


@pytest.mark.parametrize("role", ["base", "sft"])
def test_the_option_shown_for_a_value_that_is_not_finite_avoids_it(models: Models, role: str) -> None:
    models.change(role, {UP0: torch.full((8, 8), torch.nan, dtype=torch.bfloat16)})
    (shown,) = shown_options(models.refused(NonFiniteError, r"--(keep|take) '", streaming=True))
    report = models.merge(**shown)
    assert report.tensors["kept"] + report.tensors["taken"] == 1
    assert all(tensor.isfinite().all() for tensor in models.merged().values())


def test_a_refused_value_leaves_the_old_output_as_it_was(models: Models) -> None:
    models.merge()
    models.change("sft", {UP0: torch.full((8, 8), torch.nan, dtype=torch.bfloat16)})
    models.refused(NonFiniteError, r"NaN", streaming=True, overwrite=True)


def test_a_refused_value_leaves_no_parents_of_the_output_behind(models: Models) -> None:
    models.change("sft", {UP0: torch.full((8, 8), torch.nan, dtype=torch.bfloat16)})
    models.refused(NonFiniteError, r"NaN", streaming=True, out=models.folder / "new" / "deep" / "out")


@pytest.mark.parametrize("dtype", BITS)
def test_values_that_are_not_finite_go_through_as_canonical_nans_if_allowed(models: Models, dtype: torch.dtype) -> None:
    values = from_bits(BITS[dtype][2], dtype)
    for role in ("base", "sft"):
        write_model(getattr(models, role), {"w": values if role == "sft" else torch.zeros_like(values)})
    models.refused(NonFiniteError, r"'w' of sft", streaming=True, drop=0.0)
    canonical = from_bits([BITS[dtype][1]], dtype)
    for alpha in (0.0, 0.5):
        models.merge(alpha=alpha, drop=0.0, allow_nonfinite=True, overwrite=True)
        merged = models.merged()["w"]
        expected = values if alpha == 0 else values * torch.nan  # infinity / 2 is infinity - infinity / 2 here
        assert same_bits(merged, torch.where(expected.isnan(), canonical, expected))
        json.loads((models.out / "imm_report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(("option", "role"), [("keep", "base"), ("take", "sft")])
def test_kept_and_taken_tensors_are_not_checked_and_stay_bit_for_bit(models: Models, option: str, role: str) -> None:
    values = from_bits([*BITS[torch.bfloat16][2], 0x3F80], torch.bfloat16)
    for each in ("base", "sft"):
        models.change(each, {UP0: values if each == role else torch.zeros_like(values)})
    models.merge(**{option: [re.escape(UP0)]})
    assert same_bits(models.merged()[UP0], values)


@pytest.mark.parametrize(("option", "role"), [("keep", "base"), ("take", "sft")])
def test_kept_and_taken_tensors_are_not_checked_in_another_dtype_either(models: Models, option: str, role: str) -> None:
    values = from_bits([*BITS[torch.bfloat16][2], 0x3F80], torch.bfloat16)
    models.change(role, {UP0: values})
    models.merge(dtype="float32", **{option: [re.escape(UP0)]})
    canonical = from_bits([BITS[torch.float32][1]], torch.float32)
    assert same_bits(models.merged()[UP0], torch.where(values.isnan(), canonical, values.float()))


def test_a_value_too_large_for_the_output_dtype_is_refused(models: Models) -> None:
    for role in ("base", "sft"):
        models.change(role, {UP0: torch.full((8, 8), 1e5, dtype=torch.bfloat16)})
    message = models.refused(
        NonFiniteError,
        rf"'{re.escape(UP0)}': the merged value of element 0 is too large for the output dtype F16; use"
        r" --dtype bfloat16",
        streaming=True,
        dtype="float16",
    )
    assert "--allow-nonfinite" not in message
    models.refused(NonFiniteError, r"too large", streaming=True, dtype="float16", allow_nonfinite=True)
    assert models.merge(dtype="bfloat16").status == "merged"


def test_a_rescaled_delta_too_large_for_the_output_dtype_is_refused(models: Models) -> None:
    models.change("base", {UP0: torch.zeros(8, 8, dtype=torch.float16)})
    models.change("sft", {UP0: torch.full((8, 8), 6e4, dtype=torch.float16)})
    models.refused(NonFiniteError, r"too large for the output dtype F16", streaming=True, alpha=0.0, drop=0.5)
    assert models.merge(alpha=0.0, drop=0.0).status == "merged"


def test_a_sum_that_overflows_is_not_blamed_on_a_dtype_it_already_has(models: Models) -> None:
    for role, value in (("base", 3e38), ("sft", -3e38)):
        models.change(role, {UP0: torch.full((8, 8), value)})
    message = models.refused(NonFiniteError, rf"{re.escape(UP0)}': .*element 0.*too large.*F32", streaming=True)
    assert "--dtype float32" not in message


@pytest.mark.parametrize(("option", "role"), [("keep", "base"), ("take", "sft")])
def test_a_kept_or_taken_value_too_large_for_the_output_dtype_is_refused(
    models: Models, option: str, role: str
) -> None:
    models.change(role, {UP0: torch.full((8, 8), 1e5, dtype=torch.bfloat16)})
    models.refused(
        NonFiniteError,
        r"too large for the output dtype F16",
        streaming=True,
        dtype="float16",
        **{option: [re.escape(UP0)]},
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("role", ["sft", "start"])
def test_integers_that_differ_are_refused_and_the_options_shown_work(
    models: Models, role: str, dtype: torch.dtype
) -> None:
    start = models.folder / "start"
    for each in ("base", "sft", "start"):
        steps = torch.ones(9, dtype=dtype)
        steps[6:] = 0 if each == role else 1
        write_model(models.folder / each, {**random_state(SHAPES), STEPS: steps})
    message = models.refused(
        MismatchError,
        rf"'{re.escape(STEPS)}' is \w+ and not merged, but it differs at element 6 between base \S+base"
        rf" and {role} \S+{role}; .*--keep .*--take",
        streaming=True,
        start=start,
        iteration=1,
    )
    shown = shown_options(message)
    assert [list(option) for option in shown] == [["keep"], ["take"]]
    for option in shown:
        models.merge(start=start, iteration=1, overwrite=True, **option)
        source = read_model(models.base if "keep" in option else models.sft)
        assert same_bits(models.merged()[STEPS], source[STEPS])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"alpha": 2}, ArgumentError),
        ({"sft": "a/b/c"}, CheckpointError),
        ({"keep": ["nrom"]}, ArgumentError),
        ({"workers": 0}, ArgumentError),
        ({"device": "tpu"}, ArgumentError),
    ],
)
def test_iter_merged_refuses_with_the_same_words_before_the_first_tensor(
    models: Models, options: dict[str, Any], error: type[MergeError]
) -> None:
    message = models.refused(error, ".", **options)
    options = {"workers": 1, **options}
    with pytest.raises(error, match=f"^{re.escape(for_caller(message))}$"):
        iter_merged(models.base, options.pop("sft", models.sft), **options)


def test_iter_merged_refuses_values_that_are_not_finite(models: Models) -> None:
    models.change("sft", {NORM: torch.full((8,), torch.nan, dtype=torch.bfloat16)})
    message = models.refused(NonFiniteError, "NaN", streaming=True)
    tensors: Iterator[Any] = iter_merged(models.base, models.sft)
    with pytest.raises(NonFiniteError, match=f"^{re.escape(for_caller(message))}$"):
        list(tensors)


def test_every_error_is_a_merge_error_and_those_of_values_are_value_errors() -> None:
    kinds = (ArgumentError, CheckpointError, MismatchError, NonFiniteError, OutputError)
    assert all(issubclass(kind, MergeError) for kind in kinds)
    assert [kind for kind in kinds if issubclass(kind, ValueError)] == [ArgumentError, MismatchError]


def test_what_is_copied_keeps_its_bytes_and_what_is_written_is_strict_json(models: Models) -> None:
    sharded(models)
    inputs = everything(models.folder / "base") | everything(models.folder / "sft")
    models.merge(max_shard_size="300B")
    left = files_of(models.out)
    for name in ("config.json", *SIDE):
        assert left[name] == (models.sft / name).read_bytes()
    for name in ("imm_recipe.json", "imm_report.json", INDEX):
        assert isinstance(json.loads(left[name], parse_constant=pytest.fail), dict)
    assert sorted(json.loads(left[INDEX])["weight_map"]) == sorted(SHAPES)
    assert everything(models.folder / "base") | everything(models.folder / "sft") == inputs


def test_side_files_come_from_sft_else_from_base(models: Models) -> None:
    (models.sft / "tokenizer.json").write_bytes(b'{"b":2}\r\n\xff')
    (models.base / "only_base.txt").write_bytes(b"\x00\xfe")
    (models.sft / "templates" / "chat.jinja").unlink()
    models.merge()
    left = files_of(models.out)
    assert left["tokenizer.json"] == b'{"b":2}\r\n\xff'
    assert left["only_base.txt"] == b"\x00\xfe"
    assert left["templates/chat.jinja"] == SIDE["templates/chat.jinja"].encode()
