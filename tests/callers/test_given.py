"""Argument types: numpy numbers and all kinds of paths are accepted, others refused in one line."""

# These tests pass wrong types.
# mypy: disable-error-code="type-var,return-value,arg-type,call-overload,dict-item,list-item,assignment,operator"
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from checkpoints import files_of, random_state, same_bits, write_model
from commands import CONFIG, SHAPES, write_pair
from mergekit_imm import (
    ArgumentError,
    MergeError,
    dare,
    dare_merge,
    della,
    importance_factors,
    iter_merged,
    keep_mask,
    lines_factors,
    merge_checkpoints,
    merge_into,
    task_vector,
    trim,
    verify,
    weight_change,
)
from mergekit_imm.evaluation import (
    compare,
    distinct_n,
    expectation_adjusted_distinct,
    find_answer,
    group_disparity,
    improvement_set,
    judge,
    mean_pass_at_k,
    pass_at_k,
    read_samples,
)
from mergekit_imm.evaluation.bootstrap import bootstrap
from mergekit_imm.synthesis import (
    Sample,
    accumulate,
    clean_question,
    consensus,
    crescent,
    deduplicate,
    is_correct,
    keep_correct,
    mix,
    same_answer,
)

NAME = "model.layers.0.mlp.weight"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_pair(tmp_path))
    return tmp_path


class Place:
    """A custom path type."""

    def __init__(self, path: str | bytes) -> None:
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


class Model(torch.nn.Module):
    """A model with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(4))


def test_scalars_of_numpy_are_the_numbers_they_are(here: Path) -> None:
    plain: dict[str, Any] = {
        "alpha": float(np.float32(0.3)),
        "drop": float(np.float16(0.6)),
        "seed": 3,
        "iteration": 2,
        "workers": 1,
        "importance": {"0": 1.5, "1": float(np.float32(0.1))},
        "shrink": 0.25,
        "clip": (0.5, 2.0),
        "max_shard_size": 2_000_000,
    }
    scalars: dict[str, Any] = {
        "alpha": np.float32(0.3),
        "drop": np.float16(0.6),
        "seed": np.int64(3),
        "iteration": np.uint8(2),
        "workers": np.int32(1),
        "importance": {"0": np.float64(1.5), "1": np.float32(0.1)},
        "shrink": np.float32(0.25),
        "clip": (np.float32(0.5), np.int64(2)),
        "max_shard_size": np.int64(2_000_000),
    }
    merge_checkpoints("base", "sft", "one", **plain)
    merge_checkpoints("base", "sft", "other", **scalars)
    one, other = files_of(here / "one"), files_of(here / "other")
    assert {name for name in one if one[name] != other[name]} <= {"imm_recipe.json", "README.md"}  # write 2 for 2.0
    recipes = [json.loads(each["imm_recipe.json"]) for each in (one, other)]
    assert recipes[0] == recipes[1]
    verify("other")


def test_pure_functions_take_them_too() -> None:
    tensor = torch.arange(64.0)
    numbers: dict[str, Any] = {"drop": np.float32(0.5), "seed": np.int64(3), "iteration": np.int16(1)}
    plain: dict[str, Any] = {"drop": 0.5, "seed": 3, "iteration": 1}
    assert same_bits(dare(tensor, name=NAME, **numbers), dare(tensor, name=NAME, **plain))
    assert same_bits(keep_mask(NAME, (8,), offset=np.int64(8), **numbers), keep_mask(NAME, (8,), offset=8, **plain))
    assert same_bits(
        della(tensor, name=NAME, epsilon=np.float32(0.25), **numbers), della(tensor, name=NAME, epsilon=0.25, **plain)
    )
    assert same_bits(trim(tensor, drop=np.float32(0.5)), trim(tensor, drop=0.5))
    third = float(np.float32(1 / 3))
    assert lines_factors(["h.0", "h.1", "h.2"], np.float32(1 / 3), 1.0) == lines_factors(
        ["h.0", "h.1", "h.2"], third, 1.0
    )
    values = {"0": 1.0, "1": 2.0, "2": 4.0}
    assert importance_factors(values, shrink=np.float32(1 / 3)) == importance_factors(values, shrink=third)
    merged = dare_merge(tensor, tensor + 1, alpha=np.float32(0.25), factor=np.float32(2), drop=0.0)
    assert same_bits(merged, dare_merge(tensor, tensor + 1, alpha=0.25, factor=2.0, drop=0.0))


@pytest.mark.parametrize("value", [True, np.True_, "0.5", None, 1j, np.array(0.5), torch.tensor(0.5)])
def test_what_is_no_number_is_refused(value: Any) -> None:
    tensor = torch.ones(4)
    with pytest.raises(ArgumentError, match=r"^alpha "):
        dare_merge(tensor, tensor, alpha=value, drop=0.0)
    with pytest.raises(ArgumentError, match=r"^drop "):
        dare(tensor, name=NAME, drop=value)
    with pytest.raises(ArgumentError, match=r"^seed "):
        keep_mask(NAME, (4,), drop=0.5, seed=value)
    with pytest.raises(ArgumentError, match=r"^(alpha|drop|seed) "):
        merge_checkpoints("base", "sft", "out", alpha=value)


@pytest.mark.parametrize("kind", [Place, Path])
def test_every_kind_of_path_is_one(here: Path, kind: Callable[[str], Any]) -> None:
    (here / "importance.json").write_text('{"0": 1.0, "1": 2.0}')
    merge_checkpoints("base", "sft", "plain", importance="importance.json")
    report = merge_checkpoints(kind("base"), kind("sft"), kind("out"), importance=kind("importance.json"))
    assert report.out == "out"
    assert files_of(here / "out") == files_of(here / "plain")
    verify(kind("out"), base=kind("base"))
    for (_, one), (_, other) in zip(iter_merged(kind("base"), kind("sft")), iter_merged("base", "sft"), strict=True):
        assert same_bits(one, other)


PLACES: list[tuple[Any, str]] = [
    (None, "is None; give a folder"),
    (b"base", "is bytes, which os.fsdecode turns into a string; give a folder"),
    (Place(b"base"), "is .*, a Place; give a folder"),
    (["base", "sft"], "is a list of 2; give a folder"),
    ({"w": torch.ones(1)}, "is a dict of 1 names; dare_merge merges tensors by name; give a folder"),
    (torch.ones(1), "is a tensor, which dare_merge merges; give a folder"),
    (Model(), "is a model in memory .Model., which merge_into merges as the sft"),
    (7, "is 7, a int; give a folder"),
]


@pytest.mark.parametrize(("value", "match"), PLACES, ids=[type(value).__name__ for value, _ in PLACES])
def test_what_is_no_path_is_refused(here: Path, value: Any, match: str) -> None:
    model = Model()
    calls: list[tuple[str, Callable[[], object]]] = [
        ("base", lambda: merge_checkpoints(value, "sft", "out")),
        ("sft", lambda: merge_checkpoints("base", value, "out")),
        ("sft", lambda: iter_merged("base", value)),
        ("base", lambda: merge_into(model, value)),
        ("out", lambda: merge_checkpoints("base", "sft", value)),
        ("out", lambda: verify(value)),
    ]
    if value is not None:
        calls += [
            ("start", lambda: merge_checkpoints("base", "sft", "out", start=value)),
            ("start", lambda: merge_into(model, "base", start=value)),
        ]
    before = files_of(here)
    for name, call in calls:
        with pytest.raises(ArgumentError, match=f"^{name} {match}") as caught:
            call()
        assert str(caught.value).isprintable()
    assert files_of(here) == before


@pytest.mark.parametrize("model", ["sft", Path("sft"), {"w": torch.ones(1)}, None, [torch.nn.Linear(1, 1)]])
def test_merge_into_takes_a_model(here: Path, model: Any) -> None:
    with pytest.raises(MergeError, match=r"^model is a \w+; give a torch nn.Module"):
        merge_into(model, "base")


def test_states_hold_tensors(here: Path) -> None:
    state = {NAME: torch.ones(4)}
    with safe_open(here / "base" / "model.safetensors", "pt") as file:
        wrong: list[tuple[Any, str]] = [
            (np.ones(4, np.float32), r"is a ndarray, not a tensor; convert it with torch\.from_numpy"),
            (file.get_slice(NAME), r"is a PySafeSlice, not a tensor; read all of it"),
            (None, r"is a NoneType, not a tensor$"),
            ([1.0], r"is a list, not a tensor$"),
        ]
        for value, match in wrong:
            for role, states in (("base", ({NAME: value}, state)), ("sft", (state, {NAME: value}))):
                with pytest.raises(ArgumentError, match=f"^tensor '{NAME}' of {role} {match}"):
                    dare_merge(*states)
            with pytest.raises(ArgumentError, match=f"of start {match}"):
                dare_merge(state, state, start={NAME: value})
            with pytest.raises(ArgumentError, match=f"of after {match}"):
                weight_change(state, {NAME: value})
    with pytest.raises(ArgumentError, match=r"^base has the key 0; tensor names are strings"):
        dare_merge({0: torch.ones(1)}, state)
    with pytest.raises(ArgumentError, match="base is a ndarray"):
        dare_merge(np.ones(4), np.ones(4))
    with pytest.raises(ArgumentError, match=r"^before is a list of 0; give a mapping"):
        weight_change([], [])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: keep_mask(None, (4,), drop=0.5), "^name is None; give the tensor's name"),
        (lambda: dare(torch.ones(4), name=5, drop=0.5), "^name is 5"),
        (lambda: della(torch.ones(4), name=b"w", drop=0.5), "^name is b'w'"),
        (lambda: dare_merge(torch.ones(4), torch.ones(4), name=5, drop=0.5), "^name is 5"),
        (lambda: dare_merge(torch.ones(4), torch.ones(4), drop="x"), "^drop is 'x'"),
        (lambda: keep_mask("w", 4, drop=0.5), "^shape is 4; give the size of each dimension"),
        (lambda: keep_mask("w", (4.0,), drop=0.5), "^shape is "),
        (lambda: keep_mask("w", (4,), drop=0.5, offset=1.5), "^offset is 1.5"),
        (lambda: task_vector(np.ones(4), torch.ones(4)), "^sft is a ndarray, not a tensor"),
        (lambda: merge_checkpoints("base", "sft", "out", keep=None), "^keep is None; give a list of patterns"),
        (lambda: merge_checkpoints("base", "sft", "out", rename=5), "^rename is 5; give a list"),
        (lambda: merge_checkpoints("base", "sft", "out", rename=[5]), "^rename rule '5' is not understood"),
        (lambda: merge_checkpoints("base", "sft", "out", device=torch.device("cpu")), "^device is device"),
        (lambda: merge_checkpoints("base", "sft", "out", dtype="bf32"), "^dtype is 'bf32'; it must be one of base,"),
        (lambda: merge_checkpoints("base", "sft", "out", dtype=torch.int8), "^dtype is 'int8'"),
        (lambda: merge_checkpoints("base", "sft", "out", alpha=np.array(0.5)), "^alpha is array"),
        (lambda: merge_checkpoints("base", "sft", "out", workers=True), "^workers is True"),
        (lambda: merge_checkpoints("base", "sft", "out", max_shard_size=5), "write 5GB, or 5B if bytes are meant"),
        (lambda: merge_checkpoints("base", "sft", "out", max_shard_size="5"), "write 5GB"),
        (lambda: verify("out", sample="all"), "^sample is 'all'"),
        (lambda: is_correct("5", 5), "^answer is 5, a int; give a text"),
        (lambda: is_correct(None, "5"), "^response is None; give a text"),
        (lambda: same_answer("5", 5), "^other is 5"),
        (
            lambda: keep_correct([{"prompt": "", "response": "", "answer": ""}]),
            "^samples: number 0 is a dict; give",
        ),
        (lambda: mix([1], [2], share="a"), "^share is 'a'"),
        (lambda: mix([1], [2], share=0.5, seed=None), "^seed is None"),
        (lambda: pass_at_k(10, 3, 2.5), "^n, c and k are 10, 3 and 2.5"),
        (lambda: pass_at_k(10, True, 2), "must be integers"),
        (lambda: mean_pass_at_k([(5, 2)], 2.5), "^k is 2.5"),
        (lambda: distinct_n("a b a", 1), "^texts: one text 'a b a'; give a list"),
        (lambda: distinct_n(["a b a"], 1.5), "^n is 1.5"),
        (lambda: distinct_n(["a b a"], 1, tokenizer=None), "^tokenizer is None; give a function from a text"),
        (lambda: expectation_adjusted_distinct(["a"], vocabulary="x"), "^vocabulary is 'x'"),
        (lambda: find_answer("5", cut="no"), "^cut is 'no', a str; give True or False"),
        (lambda: keep_correct(5), "^samples is 5, a int; give a list of Sample"),
        (lambda: keep_correct([Sample("p", "5", 5)]), "^samples: answer of number 0 is 5"),
        (lambda: keep_correct([Sample("p", "5", "5")], matcher=None), "^matcher is None; give a function"),
        (lambda: keep_correct([Sample("p", "5", "5")], matcher=lambda *_: None), "^matcher returned None for number 0"),
        (lambda: mix(1, [2], share=0.5), "^current is 1, a int; give a list of examples"),
        (lambda: mix("abc", [2], share=0.5), "^current is 'abc', a str; give a list"),
        (lambda: accumulate([["a"], 2]), "^round 1 is 2, a int; give a list of examples"),
        (lambda: accumulate([[[1]]]), "^examples must be hashable"),
        (lambda: mean_pass_at_k([(5,)], 1), r"^counts of problem 0 are \(5,\); give \(n, c\)"),
        (lambda: mean_pass_at_k(5, 1), "^counts is 5"),
        (lambda: group_disparity(["a"], [1]), "^solved and levels must be numbers"),
        (lambda: group_disparity([2.0, 1], [1, 5]), "^solved must hold shares"),
        (lambda: improvement_set("ab", "cd"), "^model is 'ab'"),
        (lambda: improvement_set([0.5], [True]), "^model holds 0.5; give True and False"),
        (lambda: judge(0.5), "^pass_1 is 0.5, a float; give an Interval"),
        (lambda: compare("a"), "^models is 'a', a str; give a list of models"),
        (lambda: compare([5]), "^models is a list of 1; give a list of models"),
        (lambda: read_samples("a.jsonl"), "^paths is 'a.jsonl', a str; give a list of files"),
        (lambda: read_samples([5]), "^a path is 5"),
        (lambda: bootstrap(None, 5), "^statistic is None; give a function"),
        (lambda: bootstrap(lambda _: "a", 5), "^statistic failed: could not convert"),
        (lambda: bootstrap(lambda _: 1.0, 2.5), "^n is 2.5"),
        (lambda: consensus(["5"], extract=lambda _: 5), "^extract returned 5 for '5'"),
        (lambda: consensus(["5"], same=None), "^same is None; give a function"),
        (lambda: clean_question(5), "^text is 5"),
        (lambda: crescent(None, len, len, questions=1, samples=2), "^generate is None; give a function"),
        (lambda: deduplicate(["a"], None), "^encode is None; give a function"),
    ],
)
def test_values_of_other_kinds_are_one_line(here: Path, call: Callable[[], object], match: str) -> None:
    with pytest.raises(ArgumentError, match=match) as caught:
        call()
    assert isinstance(caught.value, MergeError)
    assert str(caught.value).isprintable()
    assert not Path("out").exists()


def test_numbers_of_numpy_count_as_well() -> None:
    assert pass_at_k(np.int64(5), np.int64(2), np.int64(3)) == 0.9
    assert len(mix(["a", "b", "c"], ["x", "y", "z"], share=np.float32(0.25), seed=np.int64(1))) == 4
    assert len(keep_correct([Sample("p", "5", "5")], per_prompt=np.int64(1)).samples) == 1


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_dtypes_have_short_names(here: Path, dtype: Any) -> None:
    write_model(here / "base", random_state(SHAPES, dtype=torch.float32), config=CONFIG)
    report = merge_checkpoints("base", "sft", "out", dtype=dtype)
    assert report.parameters["dtype"] == "bfloat16"
    assert json.loads((here / "out" / "imm_recipe.json").read_text())["parameters"]["dtype"] == "bfloat16"
    assert {tensor.dtype for _, tensor in iter_merged("base", "sft", dtype=dtype)} == {torch.bfloat16}
