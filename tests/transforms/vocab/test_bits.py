"""Every bit of every row: any values, dtypes and sizes; pieces, workers, sweeps."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
import strategies
from checkpoints import files_of, random_state, read_model, same_bits, write_model
from loading import EMBED
from mergekit_imm import MergeError, NonFiniteError, iter_merged, merge_checkpoints
from mergekit_imm.engine import workers
from thorough import examples
from vocabularies import Options


@given(
    rows=st.tuples(*(st.integers(1, 40) for _ in range(3))),
    columns=st.integers(1, 40),
    alpha=strategies.alphas,
    drop=strategies.drops,
    dtypes=st.tuples(*(st.sampled_from(strategies.WIDER) for _ in range(3))),
    out=st.sampled_from([None, "float32", "bfloat16"]),
    vocab=st.sampled_from(["base", "sft"]),
    started=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(  # one row of one column is not a bias of logits
    rows=(1, 2, 1),
    columns=1,
    alpha=0.0,
    drop=0.0,
    dtypes=(torch.bfloat16,) * 3,
    out=None,
    vocab="base",
    started=False,
    seed=0,
)
@settings(max_examples=examples(40))
def test_common_rows_are_merged_as_without_the_others_which_keep_every_bit(
    tmp_path_factory: pytest.TempPathFactory,
    rows: tuple[int, ...],
    columns: int,
    alpha: float,
    drop: float,
    dtypes: tuple[torch.dtype, ...],
    out: str | None,
    vocab: str,
    started: bool,
    seed: int,
) -> None:
    """Minus zeros, subnormals and non-finite values included; for any values, dtypes and sizes."""
    folder = tmp_path_factory.mktemp("bits")
    roles = ("base", "sft", "start") if started else ("base", "sft")
    sides: dict[str, Tensor] = {}
    common = min(rows[: len(roles)])
    for number, (role, count, dtype) in enumerate(zip(roles, rows, dtypes, strict=False)):
        gauss = strategies.tensor(count * columns, dtype, seed=seed + number, kind="gauss", specials=False)
        edges = strategies.tensor(count * columns, torch.bfloat16, seed=seed - number, kind="edges", specials=True)
        zeros = strategies.tensor(count * columns, dtype, seed=number, kind="gauss", specials=False) * -0.0
        tensor = torch.where(torch.arange(count * columns) % 3 == 0, zeros, gauss)
        tensor[common * columns :: 2] = edges[common * columns :: 2].to(dtype)
        sides[role] = tensor.view(count, columns)
        write_model(folder / role, {EMBED: sides[role]})
    written = sides["base"].dtype if out is None else {"float32": torch.float32, "bfloat16": torch.bfloat16}[out]
    wide = np.float64 if sides[vocab].dtype == torch.float64 else np.float32
    given_rest = reference.widen(reference.to_array(sides[vocab][common:]), wide)
    rest = reference.to_tensor(reference.narrow(given_rest, written), written, (-1, columns))
    options: Options = {"start": folder / "start", "iteration": 0} if started else {}
    merged = iter_merged(
        folder / "base", folder / "sft", vocab=vocab, alpha=alpha, drop=drop, dtype=out, allow_nonfinite=True, **options
    )
    if not np.array_equal(np.isfinite(given_rest), rest.isfinite().reshape(-1).numpy()):
        with pytest.raises(NonFiniteError, match="too large for the output dtype"):
            list(merged)
        return
    found = dict(merged)[EMBED]
    expected = reference.merge_tensors(
        sides["base"][:common],
        sides["sft"][:common],
        sides["start"][:common] if started else None,
        written,
        name=EMBED,
        alpha=alpha,
        drop=drop,
    )
    assert same_bits(found[:common], expected)
    assert same_bits(found[common:], rest)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of several pieces, none of which ends where the rows do."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder / "base", random_state({EMBED: (301, 50), "w": (70, 50)}, seed=1))
    write_model(folder / "sft", random_state({EMBED: (333, 50), "w": (70, 50)}, seed=2, dtype=torch.float32))
    return folder


@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_any_pieces_any_workers_and_the_path_of_gpus_give_the_same_bytes(
    wide: Path, tmp_path: Path, vocab: str
) -> None:
    from mergekit_imm.numerics import cuda, devices

    given = wide / "base", wide / "sft"
    one = merge_checkpoints(*given, tmp_path / "one", vocab=vocab, workers=1)
    with (
        patch("mergekit_imm.engine.workers.BUFFER", workers.MARGIN + 15 * 4096),
        patch("mergekit_imm.plan.plan.SEGMENT_ELEMENTS", 1024),
    ):
        merge_checkpoints(*given, tmp_path / "pieces", vocab=vocab, workers=3, verify=True)
    device = devices.Device(cuda.merge_span_on("cpu"), cuda.buffer)
    with patch("mergekit_imm.engine.write_folder.pick_device", lambda _: device):
        merge_checkpoints(*given, tmp_path / "gpu", vocab=vocab)
    expected = files_of(tmp_path / "one")
    assert files_of(tmp_path / "gpu") == expected
    assert files_of(tmp_path / "pieces")["model.safetensors"] == expected["model.safetensors"]
    stored = 2 * 301 * 50 + 2 * 70 * 50 + 4 * (333 if vocab == "sft" else 301) * 50 + 4 * 70 * 50
    assert one.bytes_read == stored


def test_a_sweep_reads_the_rest_once_and_writes_it_everywhere(wide: Path, tmp_path: Path) -> None:
    given = wide / "base", wide / "sft"
    merge_checkpoints(*given, tmp_path / "{alpha}", vocab="sft", alpha=[0.0, 0.3, 1.0])
    sft = read_model(wide / "sft")[EMBED]
    for alpha in (0.0, 0.3, 1.0):
        merge_checkpoints(*given, tmp_path / "alone", vocab="sft", alpha=alpha, overwrite=True)
        swept = read_model(tmp_path / str(alpha))[EMBED]
        assert same_bits(swept, read_model(tmp_path / "alone")[EMBED])
        assert same_bits(swept[301:], sft[301:].bfloat16())


def test_what_is_not_finite_is_refused_in_any_row(wide: Path, tmp_path: Path) -> None:
    state = read_model(wide / "sft")
    state[EMBED][320, 7] = torch.inf
    write_model(tmp_path / "sft", state)
    with pytest.raises(MergeError, match=rf"{EMBED}' of sft .* has 1 NaN or infinite of 16650 elements.* index 16007"):
        merge_checkpoints(wide / "base", tmp_path / "sft", tmp_path / "out", vocab="sft")
    merge_checkpoints(wide / "base", tmp_path / "sft", tmp_path / "out", vocab="base")
    merge_checkpoints(wide / "base", tmp_path / "sft", tmp_path / "inf", vocab="sft", allow_nonfinite=True)
    assert read_model(tmp_path / "inf")[EMBED][320, 7] == torch.inf
