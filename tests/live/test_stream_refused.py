"""Streams that are refused: at the call, at the tensor that is wrong, or at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import random_state, read_model, same_bits, write_model
from mergekit_imm import (
    ArgumentError,
    CheckpointError,
    MergeError,
    MismatchError,
    NonFiniteError,
    merged_stream,
)
from models import fine_tuned, new_model
from modules import BASE, OPTIONS, SFT, START, naive, write_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and start on disk."""
    return write_models(tmp_path_factory.mktemp("refused"))


class Recorded:
    """A stream that knows what was taken from it."""

    def __init__(self, pairs: Any) -> None:
        self.taken = 0
        self.pairs = list(pairs)

    def __iter__(self) -> Iterator[Any]:
        for pair in self.pairs:
            self.taken += 1
            yield pair


def refused(pairs: Any, base: Path, match: str, error: type[MergeError], **options: Any) -> int:
    """Take what comes, expecting an error; return how many tensors were taken from the stream."""
    stream = Recorded(pairs)
    with pytest.raises(error, match=match) as caught:
        list(merged_stream(stream, base, **{**OPTIONS, **options}))
    assert str(caught.value).isprintable()
    return stream.taken


# --- at the call


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (SFT, r"weights is a dict .*; merged_stream takes \(name, tensor\) pairs: give weights.items\(\)"),
        (torch.nn.Linear(2, 2), r"weights is a model in memory .* give weights.state_dict\(\).items\(\)"),
        (None, "weights is None; .* give an iterable of them"),
    ],
)
def test_what_gives_no_pairs(weights: Any, match: str, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=match):
        merged_stream(weights, folder / "base")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 2}, "alpha is 2; it is the weight"),
        ({"base": "nowhere"}, "base nowhere does not exist"),
        ({"start": "nowhere"}, "start nowhere does not exist"),
        ({"keep": ["typo"]}, r'keep=\[r"typo"\] matches none of the 5 tensor names'),
        ({"layer_factors": {"h.7": 1.0}}, "no tensor of the model lies in layer 'h.7'"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_checked_before_anything_is_taken(options: dict[str, Any], match: str, folder: Path) -> None:
    stream = Recorded(SFT.items())
    arguments = {"base": folder / "base", **OPTIONS, **options}
    with pytest.raises(MergeError, match=match):
        merged_stream(stream, **arguments)
    assert stream.taken == 0


def test_a_start_of_another_shape(folder: Path, tmp_path: Path) -> None:
    start = write_model(tmp_path / "start", {**START, "h.0.w": torch.ones(70, 44)})
    with pytest.raises(MismatchError, match=r"'h.0.w' is BF16 \[70, 45\] in base .* F32 \[70, 44\] in start"):
        merged_stream((), folder / "base", start=start, **OPTIONS)


# --- at the tensor

FIRST = ("h.0.w", SFT["h.0.w"])


def bad(name: str, value: Callable[[Tensor], Tensor]) -> tuple[str, Tensor]:
    return name, value(SFT[name].clone())


@pytest.mark.parametrize(
    ("pair", "match", "error"),
    [
        (FIRST, "tensor 'h.0.w' came twice in the stream", MismatchError),
        (
            ("module.h.0.w", SFT["h.0.w"]),
            "two tensors of the stream would become 'h.0.w' of base .*: 'h.0.w' and 'mod",
            MismatchError,
        ),
        (
            ("h.1.v", torch.ones(3)),
            r"1 tensor is in sft stream only, not in base .*take=\[r\"\^h\\.1\\.v\$\"\]",
            MismatchError,
        ),
        (
            ("rotary.inv_freq", torch.ones(3)),
            "1 tensor is in sft stream only, not in base .*'rotary.inv_freq'",
            MismatchError,
        ),
        (
            bad("norm.w", lambda t: t[:5]),
            r"'norm.w' is BF16 \[8\] in base .* and F32 \[5\] in sft stream; shapes",
            MismatchError,
        ),
        (
            bad("norm.w", lambda t: t.view(2, 4)),
            r"'norm.w' is BF16 \[8\] in base .* and F32 \[2, 4\] in sft",
            MismatchError,
        ),
        (bad("norm.w", lambda t: t.int()), "integers can be merged neither", MismatchError),
        (
            bad("embed_tokens.weight", lambda t: t[:5]),
            r"is \[7, 44\] in base .* and \[5, 44\] in sft stream;",
            MismatchError,
        ),
        (bad("norm.w", lambda t: t.to(torch.float8_e4m3fn)), "'norm.w' of the stream is torch.float8", MismatchError),
        (bad("norm.w", lambda t: t.to("meta")), "'norm.w' of the stream is on the meta device", MismatchError),
        (
            bad("norm.w", lambda t: t * torch.nan),
            "'norm.w' of sft stream is NaN or infinite at index 0",
            NonFiniteError,
        ),
        (bad("norm.w", lambda t: t.index_fill(0, torch.tensor(7), torch.inf)), "infinite at index 7", NonFiniteError),
        (("h.1.q_proj.lora_A.default.weight", torch.ones(3)), "is a part of an adapter: merge it first", MismatchError),
        (("h.1.q_proj.base_layer.weight", torch.ones(3)), "is a part of an adapter: merge it first", MismatchError),
        (("norm.w", [1.0]), r"the stream gave \('norm.w', list\); it must give \(name, tensor\)", ArgumentError),
        ((b"norm.w", torch.ones(8)), "the stream gave a tuple; it must give", ArgumentError),
        (torch.ones(2), "the stream gave a Tensor; it must give", ArgumentError),
        (None, "the stream gave a NoneType; it must give", ArgumentError),
    ],
)
def test_refused_at_once(pair: Any, match: str, error: type[MergeError], folder: Path) -> None:
    """The tensors before it were yielded, none after it was asked for."""
    rest = [each for each in SFT.items() if each[0] != "h.0.w"]
    stream = Recorded([FIRST, pair, *rest])
    merged = merged_stream(stream, folder / "base", **OPTIONS)
    name, tensor = next(merged)
    assert (name, same_bits(tensor, naive(SFT, start=False)["h.0.w"])) == ("h.0.w", True)
    with pytest.raises(error, match=match) as caught:
        next(merged)
    assert str(caught.value).isprintable()
    assert stream.taken == 2


def test_nonfinite_values_that_are_accepted(folder: Path) -> None:
    broken = {**SFT, "norm.w": SFT["norm.w"] * torch.nan}
    merged = dict(merged_stream(broken.items(), folder / "base", allow_nonfinite=True, **OPTIONS))
    assert merged["norm.w"].isnan().any()


def test_a_value_that_is_too_large_for_its_dtype(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {**BASE, "h.0.b": torch.tensor([0.0, 1e38], dtype=torch.bfloat16)})
    match = "'h.0.b': the merged value of element 1 is too large"
    refused([("h.0.b", SFT["h.0.b"])], tmp_path / "base", match, NonFiniteError, drop=0)


def test_bad_values_of_the_base(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "base", {**BASE, "norm.w": BASE["norm.w"] * torch.nan})
    match = r"'norm.w' of base .* is NaN or infinite at index 0 .*take=\[r\"\^norm"
    assert refused(SFT.items(), tmp_path / "base", match, NonFiniteError) == 5


# --- at the end


@pytest.mark.parametrize("name", ["embed_tokens.weight", "h.0.b", "norm.w"])
def test_what_never_came(name: str, folder: Path) -> None:
    rest = [each for each in SFT.items() if each[0] != name]
    match = rf"1 tensor is in base .* only, not in sft stream: '{name}'.*; to let them through: keep="
    assert refused(rest, folder / "base", match, MismatchError) == 4


def test_an_empty_stream(folder: Path) -> None:
    refused([], folder / "base", "the stream gave no tensors; give a generator that was not read before", MismatchError)


def test_parts_of_a_fused_tensor_that_never_came(tmp_path: Path) -> None:
    model = new_model("qwen3_moe")
    write_model(tmp_path / "base", dict(model.state_dict()))
    fine_tuned(model, seed=2).save_pretrained(tmp_path / "sft")
    state = read_model(tmp_path / "sft")
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    match = r"1 tensor is in base .* only, not in sft stream: 'model.layers.1.mlp.experts.gate_up_proj'"
    assert refused(state.items(), tmp_path / "base", match, MismatchError) == len(state)


def test_rules_and_patterns_that_match_nothing(folder: Path) -> None:
    refused(
        SFT.items(), folder / "base", r"rename=.* changes none of the 5 tensor names", ArgumentError, rename=["^x=y"]
    )
    refused(SFT.items(), folder / "base", r'take=\[r"typo"\] matches none of the 5', ArgumentError, take=["typo"])


def test_names_that_do_not_match_when_all_are_known(tmp_path: Path) -> None:
    """Each alone fits one of the base's; together no prefix takes both to the base's."""
    shapes = {"a.layers.0.norm.weight": (8,), "b.layers.1.mlp.w": (8, 8)}
    write_model(tmp_path / "base", random_state(shapes))
    stream = {f"x{name[1:]}": tensor for name, tensor in random_state(shapes, seed=1).items()}
    assert refused(stream.items(), tmp_path / "base", "2 tensors are in base .* only", MismatchError) == 2
    rename = ["^x(?=.layers.0)=a", "^x=b"]
    assert sorted(dict(merged_stream(stream.items(), tmp_path / "base", rename=rename))) == sorted(shapes)


@pytest.mark.parametrize("change", ["cut", "touched"])
def test_a_base_that_changes_on_the_way(change: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE)
    file = base / "model.safetensors"

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number, each in enumerate(SFT.items()):
            if number == 3:
                os.truncate(file, 1024) if change == "cut" else os.utime(file, ns=(1, 1))
            yield each

    with pytest.raises(CheckpointError, match=r"was changed or cut off|was written or removed"):
        list(merged_stream(stream(), base, **OPTIONS))


def test_an_error_of_the_stream_itself_comes_through(folder: Path) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        yield FIRST
        raise RuntimeError("the sender is gone")

    with pytest.raises(RuntimeError, match="the sender is gone"):
        list(merged_stream(stream(), folder / "base", **OPTIONS))
