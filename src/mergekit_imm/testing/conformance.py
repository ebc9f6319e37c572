"""Conformance checks: a device that computes merges, a form in which models are stored."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .reference import HELD_AS, Array, add_to_tally, key_of, naive_mask, naive_merge

if TYPE_CHECKING:
    from torch import Tensor

NAME = "model.layers.0.mlp.up_proj.weight"
SPANS = ((0, 1), (1024, 1023), (0, 1024), (1 << 40, 1025), (2048, 3000))  # first element, count
ROUNDS = (
    {"alpha": 0.5, "drop": 0.9},
    {"alpha": 0.3, "drop": 0.0},
    {"alpha": 0.7, "drop": 0.2, "factor": 1.5},
    {"alpha": 0.3, "drop": 0.0, "factor": 0.5},
    {"alpha": 1.0, "drop": 0.2},
    {"alpha": 0.0, "drop": 0.2},
    {"alpha": 0.0, "drop": 0.0},
)

_MEASURED = ("delta squared", "base squared", "change squared", "largest change", "kept")

# Hard cases of rounding and decoding: zeros, subnormals, the largest, midpoints between neighbours, ones.
_EDGES = {
    "BF16": [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x7F7F, 0xFF7F, 0x3F80, 0x3F81, 0xBF80],
    "F16": [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0x3C01, 0xBC00],
    "F32": [
        0x00000000, 0x80000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0x3F808000,
        0x3F818000, 0x3F801000, 0x3F803000, 0x33000000, 0x33000001, 0x477FEFFF, 0x477FF000, 0x7F7F8000, 0x38800000,
    ],
    "F64": [
        0, 1 << 63, 1, 0x7FEFFFFFFFFFFFFF, 0x3FF0000000000000,
        0x3FF0100000000001, 0x3FF0100000000000, 0x3FF00FFFFFFFFFFF,  # around half a bfloat16 step
        0x3FF0020000000001, 0x3FF0020000000000, 0x3FF001FFFFFFFFFF,  # float16
        0x3FF0000010000001, 0x3FF0000010000000, 0x3FF000000FFFFFFF,  # float32
    ],
}  # fmt: skip
_NOT_FINITE = {
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF],
    "F16": [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF],
    "F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
    "F64": [0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x7FF0000000000001],
}


def elements(count: int, dtype: str, *, seed: int, kind: str, finite: bool) -> Array:
    """Return elements to merge: "gauss" weights, "bits" any bit pattern, "edges" hard cases of rounding."""
    generator = np.random.default_rng(seed)
    if kind == "gauss":
        drawn = (generator.standard_normal(count) * 0.02).astype(np.float32 if dtype == "BF16" else HELD_AS[dtype])
        return (drawn.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else drawn
    width = np.dtype(HELD_AS[dtype]).itemsize
    if kind == "bits":
        bits = np.frombuffer(generator.bytes(count * width), f"u{width}").copy()
    else:
        patterns = _EDGES[dtype] + ([] if finite else _NOT_FINITE[dtype])
        bits = generator.choice(np.array(patterns, f"u{width}"), count)
    if finite:  # clear an exponent of all ones
        exponent = bits.dtype.type(_NOT_FINITE[dtype][0])
        bits[(bits & exponent) == exponent] &= ~exponent
    return bits.view(HELD_AS[dtype])


def check_device(merge_span: Callable[..., None], dtypes: Sequence[str] = ("BF16", "F16", "F32", "F64")) -> None:
    """Check that a device's `merge_span` returns the bits and statistics of the naive reference.

    Args:
        merge_span: a function with the signature of `mergekit_imm.numerics.cpu.merge_span`.
        dtypes: dtypes of base, start, sft and output, as in safetensors headers. Any three of the four take every
            combination; the output is F64 only if an input is.

    Merges lengths around a block of 1024, NaN, infinities, subnormals and ties. Raises AssertionError with the first
    differing element and the case.

    >>> from mergekit_imm.numerics.cpu import merge_span
    >>> check_device(merge_span, ["F32"])
    """
    from ..numerics.mask import arithmetic

    for combination in product(dtypes, repeat=4):
        if sum(map(list(dtypes).index, combination)) % len(dtypes) or (
            combination[3] == "F64" and "F64" not in combination[:3]
        ):
            continue
        for case, numbers in enumerate(ROUNDS):
            for kind, finite in (("gauss", True), ("bits", False), ("edges", False), ("edges", True)):
                first, count = SPANS[(case + len(kind)) % len(SPANS)]
                sides = [
                    elements(count, dtype, seed=10 * case + i, kind=kind, finite=finite)
                    for i, dtype in enumerate(combination[:3])
                ]
                if case % 2 and combination[0] == combination[1]:
                    sides[1] = sides[0]  # the start is the base: the same buffer
                what = (
                    f"{kind}, base {combination[0]}, start {'= base' if sides[1] is sides[0] else combination[1]},"
                    f" sft {combination[2]}, output {combination[3]}, {count} elements from {first}, {numbers}"
                )
                for is_delta in (False, True):
                    constants = replace(arithmetic(**numbers), is_delta=is_delta)
                    _compare(merge_span, sides, combination, first, numbers, constants, is_delta, what)


def _compare(
    merge_span: Callable[..., None],
    sides: list[Array],
    dtypes: tuple[str, ...],
    first: int,
    numbers: Mapping[str, float],
    constants: object,
    is_delta: bool,
    what: str,
) -> None:
    base, start, sft = sides
    from ..numerics.statistics import to_record

    count, key = len(base), key_of(NAME, 3, 1)
    raws = {id(side): side.view(np.uint8).copy() for side in sides}
    out, tally = np.zeros(count * np.dtype(HELD_AS[dtypes[3]]).itemsize, np.uint8), np.zeros(50)
    held = [(raws[id(side)], dtype) for side, dtype in zip(sides, dtypes, strict=False)]
    merge_span(*held, (out, dtypes[3]), count, first, key, constants, tally)
    expected = naive_merge(
        base, sft, start, dtypes[3], name=NAME, seed=3, iteration=1, first=first, is_delta=is_delta, **numbers
    )
    unsigned = f"u{expected.itemsize}"
    got, right = out.view(unsigned), expected.view(unsigned)
    wrong = np.flatnonzero(got != right)
    if len(wrong):
        at = int(wrong[0])
        raise AssertionError(
            f"element {at}: bits {int(got[at]):#x}, should be {int(right[at]):#x}; {len(wrong)} differ"
            f" ({what}{', sft is the delta' if is_delta else ''})"
        )
    if is_delta:
        return
    counted = np.zeros(50)
    add_to_tally(counted, base, start, sft, expected, naive_mask(NAME, first, count, numbers["drop"], 3, 1))
    for measured, found, due in zip(_MEASURED, to_record(tally), to_record(counted), strict=True):
        if found != due and not (np.isnan(found) and np.isnan(due)):
            raise AssertionError(f"{measured} is {found!r}, should be {due!r} ({what})")


def check_input(folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Check that a model stored in some form merges to the same bits as its tensors in a safetensors file.

    Args:
        folder: the stored model.
        state: its tensors, by their names in the merged model.

    Merges it as sft, base and start, with one worker and with three, and verifies a merge. Raises AssertionError with
    the role and the tensor, and any MergeError of a merge.

    >>> import safetensors.torch, tempfile
    >>> state = {"model.layers.0.w": torch.ones(3, 5)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors.torch.save_file(state, folder + "/model.safetensors")
    ...     check_input(folder, state)
    """
    import torch
    from safetensors.torch import load_file, save_file

    from ..engine.merge import merge_checkpoints
    from ..engine.verify import verify

    folder = Path(folder)
    config = folder / "config.json"
    generator = torch.Generator().manual_seed(0)
    other = {
        name: (tensor + torch.randn(tensor.shape, generator=generator) * 0.01).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        for role, tensors in (("plain", state), ("other", other)):
            (root / role).mkdir()
            copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
            save_file(copies, root / role / "model.safetensors", metadata={"format": "pt"})
            content = json.loads(config.read_text()) if config.exists() else {}
            (root / role / "config.json").write_text(json.dumps(content))
        for role, workers in (("sft", 1), ("base", 3), ("start", 3)):
            merged: list[dict[str, Tensor]] = []
            for source in (root / "plain", folder):
                base, sft = (source if role == name else root / "other" for name in ("base", "sft"))
                out = root / f"{role}-{len(merged)}"
                start = source if role == "start" else None
                merge_checkpoints(base, sft, out, start=start, iteration=1, drop=0.5, workers=workers, progress=False)
                merged.append({n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()})
            expected, got = merged
            if set(expected) != set(got):
                names = ", ".join(sorted(set(expected) ^ set(got)))
                raise AssertionError(f"as {role}: only one of the two merges has {names}")
            for name, tensor in expected.items():
                if tensor.dtype != got[name].dtype or tensor.shape != got[name].shape:
                    raise AssertionError(
                        f"as {role}: {name} is {got[name].dtype} {list(got[name].shape)},"
                        f" should be {tensor.dtype} {list(tensor.shape)}"
                    )
                if tensor.numel() and not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, got[name]))):
                    raise AssertionError(f"as {role}: {name} has other bits than from safetensors")
        verify(root / "sft-1", progress=False)
