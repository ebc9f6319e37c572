"""Any number of ranks (threads here) writes the bytes of one process."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from threading import current_thread
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoints import files_of, random_state, write_model
from mergekit_imm import merge_checkpoints
from mergekit_imm.engine import stream, workers
from mergekit_imm.output import direct_io
from mergekit_imm.plan.plan import SEGMENT_ELEMENTS
from merging_ranks import CONFIG, by_threads, merged_by, write_pair
from thorough import examples, others


@pytest.mark.parametrize("size", [*others(1, 2, 16), 3, 5])
def test_any_number_of_ranks_makes_the_same_bytes(pair: Path, case: Path, size: int) -> None:
    reports = merged_by(size, verify=size == 3)
    assert [report.status for report in reports] == ["merged"] * size
    assert files_of(case / "out") == files_of(pair / "one")
    assert sorted(path.name for path in case.iterdir()) == ["base", "out", "sft"]
    total = sum(path.stat().st_size for path in (case / "out").glob("*.safetensors"))
    assert reports[0].bytes_written == total
    # What lies across a cut is read twice.
    assert 2 * 0.99 * total < reports[0].bytes_read < 2 * total + size * 2 * 2 * 4 * SEGMENT_ELEMENTS
    assert [report.status for report in merged_by(size, verify=True)] == ["already merged"] * size


@settings(max_examples=examples(15))
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 300_000, 524_289])), min_size=1, max_size=5),
    size=st.integers(2, 6),
    files=st.integers(1, 3),
    dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float32]), min_size=5, max_size=5),
    tied=st.booleans(),
)
def test_no_two_ranks_write_into_one_mib(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, size: int, files: int, dtypes: Any, tied: bool
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    shapes = {"model.embed_tokens.weight": (5, 200_000)} if tied else {}
    shapes |= {f"w{number}": each for number, each in enumerate(rows)}
    for seed, role in enumerate(("base", "sft")):
        state = random_state(shapes, seed=seed)
        state = {n: t.to(dtypes[number % 5]) for number, (n, t) in enumerate(state.items())}
        if tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        names = list(state)
        shards = [names[number::files] for number in range(files)] if files <= len(names) else None
        config = CONFIG | {"tie_word_embeddings": tied}
        write_model(folder / role, state, shards=shards, config=config)
    owners: dict[tuple[str, int], set[str]] = {}
    covered: dict[str, list[tuple[int, int]]] = {}
    write_at = direct_io.write_at

    def noted(handle: direct_io.Handle, content: memoryview, offset: int) -> None:
        thread = current_thread().name
        covered.setdefault(handle.path.name, []).append((offset, offset + len(content)))
        if not thread.startswith("rank-"):  # headers are written before the other ranks begin
            for block in range(offset >> 20, (offset + len(content) - 1 >> 20) + 1):
                owners.setdefault((handle.path.name, block), set()).add(thread)
        write_at(handle, content, offset)

    def begin(plans: Any, todo: Any, sink: Any, **options: Any) -> Any:
        """Name the only worker of each rank after it."""
        name = current_thread().name.replace("rank", "of")

        def named(*given: Any) -> None:
            current_thread().name = name
            sink(*given)

        return run(plans, todo, named, **options)

    run = workers.run_segments
    with patch.object(direct_io, "write_at", noted), patch.object(stream, "run_segments", begin):
        paths = folder / "base", folder / "sft", folder / "out"
        results = by_threads(size, lambda ranks: merge_checkpoints(*paths, ranks=ranks, workers=1))
    assert not [each for each in results if isinstance(each, BaseException)]
    assert not {block: ranks for block, ranks in owners.items() if len(ranks) > 1}
    for path in (folder / "out").glob("*.safetensors"):
        ends = sorted(covered[path.name])
        assert ends[0][0] == 0
        assert sum(last - first for first, last in ends) == path.stat().st_size
        assert all(one[1] == other[0] for one, other in pairwise(ends))
    merge_checkpoints(*paths[:2], folder / "one")
    assert files_of(folder / "out") == files_of(folder / "one")
    shutil.rmtree(folder)


def test_shares_are_of_one_size(case: Path) -> None:
    reports = merged_by(3)
    own = [report.bytes_written for report in reports[1:]]
    third = reports[0].bytes_written / 3
    assert all(abs(each - third) < 3 << 20 for each in own), own


def test_a_sweep_by_ranks(pair: Path, case: Path) -> None:
    merged_by(2, "out-{alpha}", alpha=[0.2, 0.5], verify=True)
    assert files_of(case / "out-0.5") == files_of(pair / "one")
    merge_checkpoints("base", "sft", "alone", alpha=0.2, drop=0.9)
    assert files_of(case / "out-0.2") == files_of(case / "alone")


def test_a_tied_model_by_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path, tied=True)
    monkeypatch.chdir(tmp_path)
    merge_checkpoints("base", "sft", "one", drop=0.9)
    merged_by(3)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_ranks_know_the_parts_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(("base", "sft")):
        folder = write_model(tmp_path / role, random_state({"w": (3, 700_000)}, seed=seed), config=CONFIG)
        for name in ("2_Dense/model.safetensors", "value_head.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            key = "linear.weight" if "/" in name else "v_head.weight"
            save_file(random_state({key: (2, 600_000)}, seed=seed + 5), folder / name)
    merge_checkpoints("base", "sft", "one", drop=0.9)
    assert [report.status for report in merged_by(3)] == ["merged"] * 3
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")
