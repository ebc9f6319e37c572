"""Trim and DELLA: the pure functions and streamed merges against the formulas, element by element, and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import magnitude_based_pruning

import reference
from checkpoints import read_model, same_bits, write_model
from mergekit_imm import dare, della, merge_checkpoints, merge_into, trim, verify
from mergekit_imm.engine import workers
from mergekit_imm.errors import ArgumentError, NonFiniteError
from mergekit_imm.options.options import MergeOptions
from mergekit_imm.plan.describe import check
from mergekit_imm.transforms import sparsified_delta
from strategies import DTYPES
from strategies import tensor as any_tensor
from thorough import examples, others

NAME = "model.layers.0.mlp.up_proj.weight"


def tensor(count: int, dtype: torch.dtype, *, seed: int) -> torch.Tensor:
    return any_tensor(count, dtype, seed=seed, kind="gauss", specials=False)


def naive(
    delta: reference.Array, kind: str, row: int, *, drop: float, epsilon: float = 0.1, **key: Any
) -> tuple[reference.Array, reference.Array]:
    """Sparsify a delta (float32 or float64) element by element; return it, and which elements are kept."""
    out, kept = np.zeros_like(delta), np.zeros(len(delta), bool)
    if kind == "trim":
        wanted = max(1, round((1 - drop) * len(delta)))
        least = sorted((abs(float(x)) for x in delta), reverse=True)[wanted - 1]
        for i, x in enumerate(delta):
            if abs(float(x)) >= least:
                out[i], kept[i] = x, True
        return out, kept
    for begin in range(0, len(delta), row):
        order = sorted(range(begin, begin + row), key=lambda i: (abs(float(delta[i])), i))
        for rank, i in enumerate(order):
            share = rank / (row - 1) if row > 1 else 0.5
            keep16 = max(1, min(65536, round(((1 - drop) - epsilon + 2 * epsilon * share) * 65536)))
            if reference.u16(key["name"], i, key["seed"], key["iteration"]) < keep16:
                out[i], kept[i] = delta[i] * delta.dtype.type(65536 / keep16), True
    return out, kept


def naive_merge(
    base: torch.Tensor, sft: torch.Tensor, start: torch.Tensor, kind: str, *, alpha: float, factor: float, **how: Any
) -> tuple[torch.Tensor, int]:
    """Return alpha * base + (1 - alpha) * (start + factor * delta'), and the number of kept elements."""
    b, s, f = map(reference.to_array, (base, start, sft))
    wide: type = np.float64 if np.float64 in (b.dtype, s.dtype, f.dtype) else np.float32
    delta = reference.widen(f, wide) - reference.widen(s, wide)
    thin, kept = naive(delta, kind, base.shape[-1] if base.shape else 1, **how)
    moved = reference.merge(b, thin, s, base.dtype, alpha=alpha, drop=0.0, factor=factor, is_delta=True)
    # Dropped elements are the start itself, including the sign of zeros.
    alone = reference.merge(b, reference.widen(s, wide), s, base.dtype, alpha=alpha, drop=0.0)
    return reference.to_tensor(np.where(kept, moved, alone), base.dtype, base.shape), int(kept.sum())


@settings(max_examples=examples(60))
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1,), (7,), (3, 5), (2, 3, 33), (40, 130)]),
    st.integers(0, 99),
    st.sampled_from([0.1, 0.2, 0.5, 0.9]),
    st.booleans(),
)
def test_functions_match_their_formulas(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, drop: float, coarse: bool
) -> None:
    delta = tensor(int(np.prod(shape)), dtype, seed=seed).reshape(shape)
    if coarse:
        delta = (delta * 4).round() / 4  # many magnitudes are equal
    flat = reference.widen(reference.to_array(delta), np.float64 if dtype == torch.float64 else np.float32)
    key = {"name": NAME, "seed": seed, "iteration": 1}
    for kind, found in (
        ("trim", trim(delta, drop=drop)),
        ("della", della(delta, drop=drop, epsilon=min(drop, 0.05), **key)),  # type: ignore[arg-type]
    ):
        thin, _ = naive(flat, kind, shape[-1], drop=drop, epsilon=min(drop, 0.05), **key)
        expected = reference.to_tensor(reference.narrow(thin, dtype), dtype, shape)
        assert torch.equal(found, expected), kind
        assert found.dtype == dtype


def test_trim_matches_peft() -> None:
    delta = torch.randn(300, 50, generator=torch.Generator().manual_seed(0))
    for drop in (0.25, 0.5, 0.875):
        assert torch.equal(trim(delta, drop=drop), magnitude_based_pruning(delta, density=1 - drop))


def test_della_without_epsilon_is_dare() -> None:
    delta = tensor(5000, torch.float32, seed=1)
    assert same_bits(della(delta, name=NAME, drop=0.6, epsilon=0), dare(delta, name=NAME, drop=0.6))


def test_della_is_unbiased() -> None:
    """Each element's mean over 4000 seeds is within 5 standard errors: for 60 elements, fails once in 30,000 runs."""
    delta = torch.linspace(-1, 1, 60)
    seeds = 4000
    total = torch.stack([della(delta, name=NAME, drop=0.5, epsilon=0.3, seed=seed) for seed in range(seeds)])
    ranks = delta.abs().argsort(stable=True).argsort()
    keep = 0.2 + 0.6 * ranks / 59
    error = delta.abs() * ((1 - keep) / keep / seeds).sqrt()
    assert ((total.mean(0) - delta).abs() <= 5 * error + 1e-6).all()


def test_nan_and_infinity_are_kept() -> None:
    delta = torch.tensor([[0.1, float("nan"), 3.0, float("-inf")]] * 50)
    for found in (trim(delta, drop=0.9), della(delta, name=NAME, drop=0.9, epsilon=0)):
        assert found[:, 1].isnan().all()
        assert (found[:, 3] == -torch.inf).all()


def models(root: Path, shapes: dict[str, tuple[int, ...]], dtypes: Any, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Write base, start and sft with these shapes; a third of the sft's elements equal the start's."""
    found: list[dict[str, torch.Tensor]] = []
    for number, role in enumerate(("base", "start", "sft")):
        state = {
            name: tensor(int(np.prod(shape)), dtypes[number], seed=97 * seed + 3 * at + number).reshape(shape)
            for at, (name, shape) in enumerate(shapes.items())
        }
        if role == "sft":
            for name, each in state.items():
                same = torch.arange(each.numel()).reshape(each.shape) % 3 == 0
                state[name] = torch.where(same, found[1][name].to(each.dtype), each)
        write_model(root / role, state)
        found.append(state)
    return found


SHAPES = {NAME: (70, 90), "model.layers.1.norm.weight": (300,), "model.experts": (3, 5, 64), "one": ()}


@pytest.mark.parametrize("sparsify", ["trim", "della:0.2"])
@pytest.mark.parametrize(
    "dtypes", [("bf16",) * 3, *others((("bf16", "bf16", "f32"),), (("f16",) * 3,)), ("f32", "f16", "f64")]
)
def test_streamed_merge_matches_the_formula(tmp_path: Path, sparsify: str, dtypes: tuple[str, ...]) -> None:
    kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
    base, start, sft = models(tmp_path, SHAPES, [kinds[each] for each in dtypes])
    for factors in (None, {"model.layers.0": 0.5, "model.layers.1": 2.0}):
        out = tmp_path / f"out-{factors is None}"
        merge_checkpoints(
            tmp_path / "base",
            tmp_path / "sft",
            out,
            start=tmp_path / "start",
            alpha=0.3,
            drop=0.6,
            seed=5,
            iteration=2,
            sparsify=sparsify,
            layer_factors=factors,
        )
        merged, report = read_model(out), json.loads((out / "imm_report.json").read_text())
        for name in SHAPES:
            factor = (factors or {}).get(".".join(name.split(".")[:3]), 1.0)
            expected, kept = naive_merge(
                base[name],
                sft[name],
                start[name],
                sparsify[:5].strip(":"),
                alpha=0.3,
                factor=factor,
                drop=0.6,
                epsilon=0.2,
                name=name,
                seed=5,
                iteration=2,
            )
            assert same_bits(merged[name], expected), name
            assert report["tensors"][name]["kept_share"] == kept / expected.numel(), name
        assert verify(out).segments == len(SHAPES)


@pytest.mark.parametrize("sparsify", ["trim", "della"])
def test_bytes_do_not_depend_on_how_work_is_split(
    tmp_path: Path, sparsify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(
        tmp_path, {NAME: (1500, 999), "v": (5000,)}, [torch.bfloat16] * 3
    )  # more than one segment, and rows across segments
    arguments: dict[str, Any] = {"start": tmp_path / "start", "drop": 0.7, "iteration": 1, "sparsify": sparsify}
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "whole", workers=1, **arguments)
    monkeypatch.setattr(sparsified_delta, "PIECE", 1000)
    monkeypatch.setattr(workers, "BUFFER", workers.LEAST)
    merge_checkpoints(
        tmp_path / "base", tmp_path / "sft", tmp_path / "cut", workers=3, max_shard_size="2MB", **arguments
    )
    one, other = read_model(tmp_path / "whole"), read_model(tmp_path / "cut")
    assert all(same_bits(one[name], other[name]) for name in one)


def test_streamed_della_without_epsilon_is_dare(tmp_path: Path) -> None:
    state = models(tmp_path, SHAPES, [torch.bfloat16] * 3)
    state[1][NAME][:9] = -0.0  # a start of minus zero stays minus zero
    write_model(tmp_path / "start", state[1])
    for sparsify in ("dare", "della:0"):
        merge_checkpoints(
            tmp_path / "base",
            tmp_path / "sft",
            tmp_path / sparsify[:5],
            start=tmp_path / "start",
            alpha=0.0,
            iteration=1,
            drop=0.8,
            sparsify=sparsify,
        )
    one, other = read_model(tmp_path / "dare"), read_model(tmp_path / "della")
    assert all(same_bits(one[name], other[name]) for name in one)


def test_sweep_over_alpha_equals_single_merges(tmp_path: Path) -> None:
    models(tmp_path, SHAPES, [torch.bfloat16] * 3)
    for alpha in (0.2, 0.7):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / f"one-{alpha}", alpha=alpha, sparsify="trim")
    reports = merge_checkpoints(
        tmp_path / "base", tmp_path / "sft", str(tmp_path / "all-{alpha}"), alpha=[0.2, 0.7], sparsify="trim"
    )
    assert [report.kinds[0]["drop"] for report in reports] == [0.2, 0.2]
    for alpha in (0.2, 0.7):
        one, other = read_model(tmp_path / f"one-{alpha}"), read_model(tmp_path / f"all-{alpha}")
        assert all(same_bits(one[name], other[name]) for name in one)


def test_no_drop_and_drop_0_keep_the_whole_delta(tmp_path: Path) -> None:
    models(tmp_path, SHAPES, [torch.bfloat16] * 3)
    folders: dict[str, dict[str, Any]] = {
        "plain": {"drop": 0},
        "zero": {"drop": 0, "sparsify": "della"},
        "no_drop": {"drop": 0.9, "sparsify": "trim", "no_drop": ["."]},
    }
    for name, options in folders.items():
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / name, **options)
    states = [read_model(tmp_path / name) for name in folders]
    assert all(same_bits(states[0][name], other[name]) for other in states[1:] for name in SHAPES)


def test_invalid_options_are_refused(tmp_path: Path) -> None:
    models(tmp_path, SHAPES, [torch.float32] * 3)

    def merge(**options: Any) -> None:
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out{drop}{seed}", **options)

    for options, message in (
        ({"sparsify": "topk"}, "must be dare, trim, della"),
        ({"sparsify": "della:x"}, "must be dare, trim, della"),
        ({"sparsify": "trim:3"}, "must be dare, trim, della"),
        ({"sparsify": "della:0.3", "drop": 0.2}, "from -0.1 to 0.5"),
        ({"sparsify": "della:0.2", "drop": 0.8}, r"from 0\.6 to 1"),
        ({"sparsify": "della", "drop": [0.2, 0.3]}, "one by one"),
        ({"sparsify": "trim", "seed": [0, 1]}, "one by one"),
    ):
        with pytest.raises(ArgumentError, match=message):
            merge(**options)
    with pytest.raises(TypeError, match="sparsify"):
        merge_into(torch.nn.Linear(2, 2), tmp_path / "base", sparsify="trim")  # type: ignore[call-arg]


def test_long_rows_and_different_vocabularies_are_refused_with_a_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path, SHAPES, [torch.float32] * 3)
    monkeypatch.setattr("mergekit_imm.plan.decide.LONGEST_ROW", 80)
    with pytest.raises(ArgumentError, match=r"rows of 90 .* no_drop=.r.\^model.*layers"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", sparsify="della")
    for role, rows in (("small", 5), ("large", 7)):
        write_model(tmp_path / role, {"model.embed_tokens.weight": torch.ones(rows, 4)})
    with pytest.raises(ArgumentError, match="rows that only one of the models has"):
        merge_checkpoints(tmp_path / "small", tmp_path / "large", tmp_path / "out", sparsify="trim", vocab="sft")


@pytest.mark.parametrize("sparsify", ["trim", "della"])
def test_nan_is_refused_even_if_it_would_be_dropped(tmp_path: Path, sparsify: str) -> None:
    state = models(tmp_path, SHAPES, [torch.bfloat16] * 3)
    state[2][NAME][3, 4] = float("nan")
    write_model(tmp_path / "sft", state[2])
    with pytest.raises(NonFiniteError, match=r"mlp.up_proj.weight' of .*sft.* has 1 NaN or infinite of 6300"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", sparsify=sparsify, drop=0.89)


def test_recipes_hold_sparsify_only_if_used(tmp_path: Path) -> None:
    """So recipes of DARE merges stay as they were before other sparsifiers existed."""
    models(tmp_path, SHAPES, [torch.float32] * 3)
    for sparsify, held in (("dare", None), ("trim", "trim"), ("della", "della:0.1"), ("della:.10", "della:0.1")):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", sparsify=sparsify, overwrite=True)
        recipe = json.loads((tmp_path / "out" / "imm_recipe.json").read_text())
        assert recipe["parameters"].get("sparsify") == held
        assert not {"shrink", "clip", "layer_factors"} & set(recipe["parameters"])
    again = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", sparsify="della")
    assert again.status == "already merged"


def test_check_reports_the_requested_drop(tmp_path: Path) -> None:
    models(tmp_path, SHAPES, [torch.float32] * 3)
    assert check(tmp_path / "base", tmp_path / "sft", MergeOptions(sparsify="della:0.3", drop=0.5)).problems == []
    with pytest.raises(ArgumentError, match=r"use della:0\.098 or less"):
        MergeOptions(sparsify="della:0.15", drop=0.9)


@pytest.mark.parametrize("epsilon", [None, "x", -0.1, float("nan")])
def test_epsilon_must_be_a_number(epsilon: Any) -> None:
    for drop in (0.0, 0.5):
        with pytest.raises(ArgumentError, match="epsilon"):
            della(torch.ones(4), name=NAME, drop=drop, epsilon=epsilon)


def test_trim_threshold_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path, {NAME: (1500, 999), "v": (5000,)}, [torch.bfloat16] * 3)
    computed, shared = [], sparsified_delta.Trimmed.shared

    def counted(self: sparsified_delta.Trimmed, reads: Any) -> sparsified_delta.Threshold:
        computed.append(self.name)
        return shared(self, reads)

    monkeypatch.setattr(sparsified_delta.Trimmed, "shared", counted)
    monkeypatch.setattr(workers, "BUFFER", workers.LEAST)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", sparsify="trim", workers=4)
    assert sorted(computed) == sorted([NAME, "v"])
