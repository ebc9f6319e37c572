"""Assert the check values of docs/arithmetic.md; write them and the program that gives them into it.

    python docs/scripts/check_values.py [--check]

They are computed by the short program on that page (`reference.py`), compared with the values that were fixed with
version 1 of the mask, and then with what the library gives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pages import update

import mergekit_imm
import reference as ref
from mergekit_imm.numerics.mask import mask_key

NAME = "model.layers.0.mlp.up_proj.weight"
KEYS = {(0, 0): (0x37734ECD, 0x6FF7E38A), (7, 2): (0x01476898, 0x5462FD35)}
PHILOX = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
U = {
    0: [4148, 55136, 42164, 48325, 2085, 30562, 53875, 18801],
    126: [43942, 28078, 28806, 6885],
    510: [51676, 45284, 31269, 6272],
    1022: [27824, 53095, 12735, 63499],
    1 << 40: [31615, 40465, 35314, 52053],
}
KEPT = 104639  # of the first 2^20 elements, at drop 0.9

BASE = [1.0, -2.0, 0.1, 3.0, 1e-40, -0.0, 65504.0, 0.3]
START = [1.5, -2.5, 0.1, 3.0, 2e-40, 0.0, 65504.0, 0.2]
SFT = [2.5, -2.0, 0.7, 3.0, 5e-40, 0.0, 65000.0, 0.4]
SIDES = (BASE, START, SFT)
SETTINGS = [(0.5, 0.5, 1.0), (0.75, 0.2, 1.0), (0.3, 0.0, 1.5), (0.5, 0.0, 1.0), (1.0, 0.2, 1.0), (0.0, 0.2, 1.0)]


def check_mask() -> None:
    """Compare keys, random bits and masks."""
    assert ref.philox4x32_10((0, 0, 0, 0), (0, 0)) == PHILOX
    for (seed, iteration), key in KEYS.items():
        assert ref.mask_key(NAME, seed, iteration) == mask_key(NAME, seed, iteration) == key
    for first, bits in U.items():
        assert [ref.u(first + i, KEYS[0, 0]) for i in range(len(bits))] == bits
        for drop in (0.05, 0.2, 0.5, 0.9):
            mask = mergekit_imm.keep_mask(NAME, (len(bits),), drop=drop, offset=first)
            assert mask.tolist() == [each < ref.keep16(drop) for each in bits]
    assert int(mergekit_imm.keep_mask(NAME, (1 << 20,), drop=0.9).sum()) == KEPT


def merge_rows() -> list[str]:
    """Compare merges, and return a row of bit patterns for each."""
    rows = []
    sides = [np.array(side, np.float32) for side in SIDES]
    for alpha, drop, factor in SETTINGS:
        ours = ref.merged(*sides, name=NAME, alpha=alpha, drop=drop, factor=factor)
        base, start, sft = map(torch.from_numpy, sides)
        parameters = {"start": start, "name": NAME, "alpha": alpha, "drop": drop, "factor": factor}
        theirs = mergekit_imm.dare_merge(base, sft, **parameters)
        assert (ours.view(np.uint32) == theirs.numpy().view(np.uint32)).all()
        narrow = mergekit_imm.dare_merge(base, sft, dtype=torch.bfloat16, **parameters)
        assert (ref.bfloat16_bits(ours) == narrow.view(torch.uint16).numpy()).all()
        bits = " ".join(f"{x:08x}" for x in ours.view(np.uint32))
        rows.append(f"alpha {alpha:<4}  drop {drop}  factor {factor}\n    {bits}")
    return rows


def many() -> None:
    """Compare the program with the library on random tensors."""
    generator = np.random.default_rng(0)
    for number in range(20):
        base = generator.normal(0, 0.02, 1500).astype(np.float32)
        start = (base + generator.normal(0, 0.002, 1500)).astype(np.float32)
        sft = (start + generator.normal(0, 0.002, 1500)).astype(np.float32)
        alpha, drop, factor = generator.random(), generator.random(), 2 * generator.random()
        common = {"name": f"w{number}", "alpha": alpha, "drop": drop, "factor": factor, "seed": -3, "iteration": number}
        ours = ref.merged(base, start, sft, **common)
        theirs = mergekit_imm.dare_merge(
            torch.from_numpy(base), torch.from_numpy(sft), start=torch.from_numpy(start), **common
        )
        assert (ours.view(np.uint32) == theirs.numpy().view(np.uint32)).all()


def mask_values() -> str:
    """Return the check values of the mask as text."""
    key = [f"seed {s}, iteration {t}: k0 = {k0:#010x}, k1 = {k1:#010x}" for (s, t), (k0, k1) in KEYS.items()]
    bits = [
        f"e = {'2^40' if first == 1 << 40 else first}...: {' '.join(map(str, values))}" for first, values in U.items()
    ]
    lines = [
        "Philox4x32-10, key 0 0, counter 0 0 0 0",
        f"    {' '.join(f'{word:08x}' for word in PHILOX)}",
        "key of " + NAME,
        *(f"    {line}" for line in key),
        "u of that tensor, seed 0, iteration 0",
        *(f"    {line}" for line in bits),
        f"kept among its first 2^20 elements, drop 0.9: {KEPT}",
    ]
    return "\n".join(["```text", *lines, "```"])


def merge_values() -> str:
    """Return the check values of the arithmetic as text."""
    sides = [
        f"{label:<6}{' '.join(map(repr, side))}" for label, side in (("base", BASE), ("start", START), ("sft", SFT))
    ]
    return "\n".join(["```text", *sides, "", *merge_rows(), "```"])


if __name__ == "__main__":
    check_mask()
    many()
    program = Path(ref.__file__).read_text(encoding="utf-8").split("\n\n", 1)[1]
    parts = {"program": f"```python\n{program}```", "mask values": mask_values(), "merge values": merge_values()}
    update("arithmetic.md", parts, __doc__)
