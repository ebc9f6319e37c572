"""A model sharded over ranks, merged in place: each rank reads its own part; the bits are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpoints import State, random_state, same_bits, write_model
from commands import HUNG
from live_ranks import WORLDS
from mergekit_imm import MismatchError, NonFiniteError, merge_into
from mergekit_imm.live.local_shards import boxes, held, live_tensors
from mergekit_imm.ranks.ranks import ALONE
from modules import SHAPES, Model, fresh, naive, put, state_of, values_of, write_models


@st.composite
def placed(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Placement], dict[str, tuple[int, ...]]]:
    mesh = draw(st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3), (2, 1, 2)]))
    ndim = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(ndim))
    kinds = st.sampled_from([Replicate(), *(Shard(dim) for dim in range(-1, ndim))])
    return mesh, [draw(kinds) for _ in mesh], {"h.w": shape}


def distributed(state: State, ranks: Any, placements: list[Placement]) -> nn.Module:
    return put(fresh(state), lambda _, tensor: distribute_tensor(tensor, ranks, placements, src_data_rank=None))


def local(model: nn.Module, name: str) -> Tensor:
    tensor: Any = model.get_parameter(name).detach()
    found: Tensor = tensor.to_local()
    return found


def on_each_rank(mesh: tuple[int, ...]) -> Iterator[Any]:
    """Act as each rank in turn, with fake process groups."""
    world = int(torch.tensor(mesh).prod())
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield init_device_mesh("cpu", mesh)
        finally:
            dist.destroy_process_group()
            _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]  # else the next rank gets this mesh


def assert_placed(mesh: tuple[int, ...], placements: list[Placement], shapes: dict[str, tuple[int, ...]]) -> None:
    """Each rank finds the index of every element that torch gave it."""
    for ranks in on_each_rank(mesh):
        state = {n: torch.arange(int(torch.tensor(s).prod())).float().view(s) for n, s in shapes.items()}
        model = distributed(state, ranks, placements)
        for name, live in live_tensors(model).items():
            assert live.shape == shapes[name]
            found: dict[int, float] = {}
            for each in held(live, 0, live.count):
                found |= values_of(each)
            assert all(index == value for index, value in found.items())
            assert len(found) == local(model, name).numel()


@given(placed())
@settings(max_examples=60, deadline=None)
def test_which_elements_a_rank_holds(case: Any) -> None:
    assert_placed(*case)


@pytest.mark.parametrize(("mesh", "rest"), [((2, 2), [Shard(0)]), ((3, 2), [Shard(0)]), ((2, 3), [Replicate()])])
def test_shards_of_shards(mesh: tuple[int, ...], rest: list[Placement]) -> None:
    """FSDP2 over tensor parallelism along the same dimension."""
    assert_placed(mesh, [_StridedShard(0, split_factor=mesh[1]), *rest], {"a": (12, 5), "b": (24,), "c": (12, 3, 2)})


def test_placements_that_are_refused() -> None:
    for ranks in on_each_rank((2, 2)):
        strange: list[tuple[list[Placement], str]] = [
            ([Partial(), Replicate()], "is partial: ranks hold summands"),
            ([_StridedShard(0, split_factor=2), Shard(0)], "does not divide into 2 x 2 equal parts"),
        ]
        for placements, match in strange:
            whole = DTensor.from_local(
                torch.ones(5, 3), ranks, placements, run_check=False, shape=torch.Size((9, 3)), stride=(3, 1)
            )
            with pytest.raises(MismatchError, match=match):
                live_tensors(Model({"w": whole}))
        break


@given(placed(), st.sampled_from([0, 8192]))
@settings(max_examples=15, deadline=None)
def test_a_rank_has_its_slice_of_the_whole(case: Any, gap: int) -> None:
    """With tensors of several blocks, and one rank at a time."""
    mesh, placements, shapes = case
    shapes = {name: (*shape[:-1], shape[-1] * 67) for name, shape in shapes.items()}
    base, sft = random_state(shapes), random_state(shapes, seed=1, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as there, patch("mergekit_imm.live.in_place.GAP", gap):
        write_model(Path(there), base)
        whole = fresh(sft)
        merge_into(whole, there, drop=0.5)
        for ranks in on_each_rank(mesh):  # fake ranks cannot gather
            one, other = (distributed(state, ranks, placements) for state in (sft, state_of(whole)))
            with patch("mergekit_imm.live.merge_into.Ranks.of_group", return_value=ALONE):
                merge_into(one, there, drop=0.5, workers=2)
            for name in shapes:
                assert same_bits(local(one, name), local(other, name))


def columns_merged(sft: State, folder: Path, drop: float = 0.5) -> Iterator[tuple[int, nn.Module]]:
    """Merge the columns of each of two ranks, alone."""
    for rank, ranks in enumerate(on_each_rank((2,))):
        model = distributed(sft, ranks, [Shard(1)])
        with patch("mergekit_imm.live.merge_into.Ranks.of_group", return_value=ALONE):
            merge_into(model, folder, drop=drop)
        yield rank, model


@pytest.mark.parametrize("columns", [600, 6000])
def test_what_another_rank_holds_cannot_be_too_large(columns: int, tmp_path: Path) -> None:
    """A rank reads the base's elements between its own; it does not have the model's."""
    base = random_state({"h.w": (9, columns)}, dtype=torch.float16)
    base["h.w"][:, columns // 2 :: 7] = 60_000.0
    sft = {"h.w": base["h.w"] * 0.99}
    write_model(tmp_path, base)
    whole = fresh(sft)
    merge_into(whole, tmp_path, drop=0.9)
    for rank, model in columns_merged(sft, tmp_path, drop=0.9):
        expected = state_of(whole)["h.w"].tensor_split(2, dim=1)[rank].contiguous()
        assert same_bits(local(model, "h.w"), expected)


@pytest.mark.parametrize("columns", [600, 6000])
def test_only_the_rank_that_holds_a_bad_value_refuses_it(columns: int, tmp_path: Path) -> None:
    base = random_state({"h.w": (9, columns)})
    sft = random_state({"h.w": (9, columns)}, seed=1)
    bad = (3, columns - 2)
    base["h.w"][bad] = torch.nan
    write_model(tmp_path, base)
    merged = columns_merged(sft, tmp_path)
    assert next(merged)[0] == 0
    with pytest.raises(NonFiniteError, match=rf"'h\.w' of base .* at index {3 * columns + bad[1]} \(1 such"):
        next(merged)


def test_integers_in_columns_are_compared(tmp_path: Path) -> None:
    base: State = {"h.w": torch.ones(4, 4), "h.table": torch.arange(9 * 600).view(9, 600)}
    write_model(tmp_path, base)
    sft = {name: tensor.clone() for name, tensor in base.items()}
    assert [rank for rank, _ in columns_merged(sft, tmp_path)] == [0, 1]
    sft["h.table"][5, 500] += 1
    merged = columns_merged(sft, tmp_path)
    assert next(merged)[0] == 0
    with pytest.raises(MismatchError, match=rf"'h\.table' .* differs at element {5 * 600 + 500} between"):
        next(merged)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_part_of_a_tensor_of_any_strides(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(sizes))))
    tensor = torch.arange(int(torch.tensor(sizes).prod())).view(sizes).permute(*order)
    first = data.draw(st.integers(0, tensor.numel()))
    end = data.draw(st.integers(first, tensor.numel()))
    found = torch.full((end - first,), -1)
    views = list(boxes(tensor, first, end))
    for at, view in views:
        found[at : at + view.numel()] = view.flatten()
    assert torch.equal(found, tensor.flatten()[first:end])
    assert len(views) <= max(1, 2 * tensor.ndim - 1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of all ranks of all runs."""
    folder = write_models(tmp_path_factory.mktemp("ranks"))
    script = Path(__file__).parents[1] / "support" / "live_ranks.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, str(script), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HUNG, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_together(world: int, ranks: Path) -> None:
    expected = naive(torch.load(ranks / "sft.pt"))
    layouts = {path.stem.split("-")[1] for path in ranks.glob(f"{world}-*.pt")} - {"refused"}
    assert len(layouts) == 2 * (6 + 3 * (world == 4))  # in place, and as a stream
    for layout in layouts:
        for rank in range(world):
            found = torch.load(ranks / f"{world}-{layout}-{rank}.pt")
            assert [name for name in SHAPES if not same_bits(found[name], expected[name])] == [], (layout, rank)


@pytest.mark.parametrize("world", WORLDS)
def test_what_one_rank_refuses_all_do(world: int, ranks: Path) -> None:
    *others, last = [torch.load(ranks / f"{world}-refused-{rank}.pt") for rank in range(world)]
    assert "NonFiniteError: tensor '" in last["nan"][0]
    assert "CheckpointError: base" in last["base"][0]
    late = "PartialMergeError: the merge failed after parts of the model were written"
    assert last["disk"][0].startswith(f"{late}: the disk is gone; load the model again")
    for each in others:
        for case in ("nan", "base"):
            kind, message = last[case][0].split(": ", 1)
            assert each[case][0] == f"{kind}: rank {world - 1} of {world}: {message}"
        assert each["disk"][0].startswith(f"{late}: rank {world - 1} of {world}: OSError: the disk is gone")
    for each in (*others, last):
        assert each["alpha"][0].startswith("MismatchError: the ranks would not make the same merge")
        assert all(each[case][1] for case in ("nan", "alpha", "base"))
