"""`Rounds` with a checkpoint, tensors or a model per round, against the formulas."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import State, random_state, read_model, same_bits, write_model
from mergekit_imm import (
    ArgumentError,
    CheckpointError,
    MergeError,
    MismatchError,
    OutputError,
    Rounds,
    dare_merge,
)
from mergekit_imm.schedules import linear, listed
from models import fine_tuned, load, new_model

SHAPES = {"model.embed.weight": (8, 4), "model.layers.0.w": (16, 16), "model.layers.1.w": (16, 16)}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.chdir(tmp_path)
    state = random_state(SHAPES)
    write_model(tmp_path / "base", state)
    return state


def tuned(state: State, number: int) -> State:
    return {name: (tensor.float() + 0.01 * (number + 1)).to(tensor.dtype) for name, tensor in state.items()}


def assert_same(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not same_bits(one[name], other[name])] == []


@pytest.mark.parametrize("form", ["checkpoint", "tensors", "module"])
def test_each_round_is_that_of_the_formula(base: State, form: str) -> None:
    rounds = Rounds("base", alpha=linear(0.2, 0.8, 3), drop=0.5, seed=4, options={"no_drop": ["embed"]})
    start = base
    for number, alpha in enumerate((0.2, 0.5, 0.8)):
        sft = tuned(start, number)
        expected = {
            name: dare_merge(
                base[name],
                sft[name],
                start=start[name],
                name=name,
                alpha=alpha,
                iteration=number,
                seed=4,
                drop=0.0 if "embed" in name else 0.5,
            )
            for name in base
        }
        given: Any = sft
        saved: dict[str, Any] = {}
        if form == "checkpoint":
            given = write_model(Path(f"sft-{number}"), sft)
        elif form == "module":
            given = torch.nn.Module()
            for name, tensor in sft.items():
                given.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor))
            given.state_dict = lambda given=given, **_: {n: given.get_parameter(n.replace(".", "_")) for n in SHAPES}

            def save(model: Any, out: Path) -> None:
                write_model(out, {name: tensor.detach() for name, tensor in model.state_dict().items()})

            saved = {"save": save}
        before = rounds
        rounds = rounds.merge(given, f"merged-{number}", **saved)
        assert (before.iteration, rounds.iteration, rounds.start) == (number, number + 1, f"merged-{number}")
        assert_same(read_model(Path(f"merged-{number}")), expected)
        if form == "tensors":
            assert_same(given, expected)  # in place
        start = expected


def test_a_model_of_transformers_is_merged_in_place_and_saved(tmp_path: Path) -> None:
    model = new_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    sft = fine_tuned(model, seed=2)
    sft.save_pretrained(tmp_path / "sft")
    rounds = Rounds(tmp_path / "base", alpha=0.3, drop=0.5)
    after = rounds.merge(sft, tmp_path / "live")
    rounds.merge(tmp_path / "sft", tmp_path / "streamed")
    assert_same(read_model(tmp_path / "live"), read_model(tmp_path / "streamed"))
    live = load(tmp_path / "live", "qwen3_moe").state_dict()
    state: dict[str, Tensor] = sft.state_dict()
    assert_same(state, live)
    assert after.start == tmp_path / "live"


def test_a_model_that_cannot_save_itself_is_refused_before_it_is_merged(base: State) -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    with pytest.raises(ArgumentError, match="Linear has no save_pretrained; give `save`"):
        Rounds("base").merge(module, "out")
    assert same_bits(module.weight.detach(), before)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_pair(stored: list[str], *, tied: bool = True) -> tuple[State, State]:
    """A base that stores its embedding under these names, and a trained model with a tied head."""
    base = random_state({EMBED: (8, 4), "model.layers.0.w": (4, 4)}, dtype=torch.float32)
    base |= {HEAD: base[EMBED]}
    written = {name: base[name].clone() for name in [*stored, "model.layers.0.w"]}
    write_model(Path("base"), written, config={"model_type": "tiny", "tie_word_embeddings": tied})
    sft = {name: tensor + 1 for name, tensor in base.items() if name != HEAD}
    return base, sft | {HEAD: sft[EMBED]}


def halfway(base: State, sft: State) -> State:
    return {name: 0.5 * base[name] + 0.5 * sft[name].detach() for name in sft}


def assert_close(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("stored", [[EMBED], [HEAD], [EMBED, HEAD]], ids=["embedding", "head", "both"])
def test_tensors_of_a_tied_head_are_merged_once_and_saved_as_the_base_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base, sft = tied_pair(stored)
    expected = halfway(base, sft)
    Rounds("base", drop=0).merge(sft, "out")
    assert_close(sft, expected)
    assert sft[HEAD] is sft[EMBED]
    assert_close(read_model(Path("out")), {name: expected[name] for name in [*stored, "model.layers.0.w"]})
    assert sorted(path.name for path in Path().iterdir()) == ["base", "out"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["model.safetensors"]
    # And the next round starts from it.
    again = {name: tensor.clone() + 1 for name, tensor in read_model(Path("out")).items()}
    after = Rounds("base", start="out", iteration=1, drop=0).merge(again, "second")
    assert after.iteration == 2


def test_names_that_wrappers_changed_are_those_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, sft = tied_pair([EMBED, HEAD])
    expected = halfway(base, sft)
    Rounds("base", drop=0).merge({f"module.{name}": tensor for name, tensor in sft.items()}, "out")
    assert_close(read_model(Path("out")), {f"module.{name}": tensor for name, tensor in expected.items()})


def test_views_of_one_buffer_are_tensors_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = random_state({"a.w": (4, 4), "b.w": (4, 4)}, dtype=torch.float32)
    write_model(Path("base"), base)
    flat = torch.arange(32, dtype=torch.float32)
    sft = {"a.w": flat[:16].view(4, 4), "b.w": flat[16:].view(4, 4).T}
    expected = halfway(base, sft)
    Rounds("base", drop=0).merge(sft, "out")
    assert_close(read_model(Path("out")), expected)
    overlapping = {"a.w": flat[:16].view(4, 4), "b.w": flat[8:24].view(4, 4)}
    before = flat.clone()
    with pytest.raises(MismatchError, match="share part of their memory"):
        Rounds("base", drop=0).merge(overlapping, "other")
    assert torch.equal(flat, before)
    assert not list(Path().glob("other*"))


def test_what_can_be_refused_is_refused_before_the_tensors_change(base: State, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.safetensors").touch()
    (tmp_path / "file").touch()
    (tmp_path / "built.partial").mkdir()
    (tmp_path / "built.partial" / "mine").touch()
    nan = tuned(base, 0)
    nan["model.layers.1.w"][0, 0] = float("nan")
    lacking = {name: tensor for name, tensor in tuned(base, 0).items() if "1" not in name}
    cases: list[tuple[Any, str, dict[str, Any], str]] = [
        (tuned(base, 0), "taken", {}, "output taken exists and is not empty"),
        (tuned(base, 0), "base", {}, "output base exists and is not empty"),
        (tuned(base, 0), "file", {}, "output file is a file"),
        (tuned(base, 0), "file/below", {}, "lies below a file"),
        (tuned(base, 0), "built", {}, "built.partial exists, where the output is built"),
        (tuned(base, 0), "/proc/out", {}, "/proc/out.partial cannot be written"),
        (tuned(base, 0), "out", {"dtype": "float32"}, "'dtype' is not an option of a merge in memory"),
        (nan, "new/out", {}, "NaN"),
        (lacking, "out", {}, "1 tensor is in"),
        ({**tuned(base, 0), "x": None}, "out", {}, "'x' is a NoneType"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for sft, out, options, match in cases:
        kept = {name: tensor.clone() for name, tensor in sft.items() if tensor is not None}
        with pytest.raises(MergeError, match=match):
            Rounds("base", options=options).merge(sft, out)
        assert_same({name: tensor for name, tensor in sft.items() if tensor is not None}, kept)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_save_that_fails_is_gone_on_with_and_nothing_is_merged_twice(base: State) -> None:
    sft = {name: tensor.float() for name, tensor in tuned(base, 0).items()}
    expected = halfway({name: tensor.float() for name, tensor in base.items()}, sft)
    rounds = Rounds("base", drop=0)

    def fails(*_: Any) -> None:
        raise ValueError("no luck")

    with pytest.raises(OutputError, match=r"round 0 is merged, in memory, and cannot be saved in out: no luck; .*call"):
        rounds.merge(sft, "out", save=fails)
    torch.testing.assert_close(sft, expected)
    with pytest.raises(ArgumentError, match="is already merged but not saved: call save_merged"):
        rounds.merge(dict(sft), "out")
    torch.testing.assert_close(sft, expected)
    with pytest.raises(OutputError, match="cannot be saved in out: no luck"):
        rounds.save_merged(sft, "out", save=fails)
    after = rounds.save_merged(sft, "out")
    assert (after.iteration, after.start) == (1, "out")
    assert_close(read_model(Path("out")), expected)
    with pytest.raises(ArgumentError, match="round 0 has not merged this model; call merge"):
        rounds.save_merged(sft, "other")
    second = {name: tensor + 1 for name, tensor in sft.items()}
    assert after.merge(second, "second").iteration == 2


def test_what_a_save_that_was_killed_left_is_replaced(base: State) -> None:
    script = """
import os, sys
import torch
from safetensors.torch import load_file
from mergekit_imm import Rounds
class Model(torch.nn.Module):
    def save_pretrained(self, folder):
        (folder / "model.safetensors").write_bytes(b"half of it")
        os.kill(os.getpid(), 9)
model = Model()
for name, tensor in load_file("base/model.safetensors").items():
    *path, last = name.split(".")
    module = model
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, torch.nn.Parameter(tensor))
Rounds("base").merge(model, "out")
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert (Path("out.partial/model.safetensors").read_bytes(), Path("out").exists()) == (b"half of it", False)
    sft = tuned(base, 0)
    held = os.open("out.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match=r"out\.partial is being written by another process"):
        Rounds("base").merge(sft, "out")
    os.close(held)
    assert_same(sft, tuned(base, 0))
    Rounds("base").merge(sft, "out")
    assert_same(read_model(Path("out")), sft)
    assert sorted(path.name for path in Path().iterdir()) == ["base", "out"]


def test_a_full_disk_leaves_no_half_of_a_model(tmp_path: Path) -> None:
    """A real disk with room for the tensors but not the header; with more room the model is saved."""
    place, base = tmp_path / "disk", random_state({"w": (32, 32)}, dtype=torch.float32)
    place.mkdir()
    write_model(tmp_path / "base", base)
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(place), "-o"]
    if subprocess.run([*mount, "size=4k"], capture_output=True).returncode:
        pytest.skip("no filesystem can be mounted here")
    try:
        sft = {"w": base["w"] + 1}
        expected = halfway(base, sft)
        rounds = Rounds(tmp_path / "base", drop=0)
        with pytest.raises(
            OutputError, match=r"is merged, in memory, and cannot be saved in .*No space left on device"
        ):
            rounds.merge(sft, place / "out")
        assert list(place.iterdir()) == []
        with pytest.raises(ArgumentError, match="is already merged but not saved"):
            rounds.merge(sft, place / "out")
        (place / "filler").touch()
        (place / "filler").write_bytes(b"x")
        with pytest.raises(OutputError, match=r"needs 4\.1 kB and the disk has 0 bytes free"):
            rounds.save_merged(sft, place / "out")
        subprocess.run([*mount, "remount,size=1m"], check=True)
        assert rounds.save_merged(sft, place / "out").iteration == 1
        assert_close(read_model(place / "out"), expected)
    finally:
        subprocess.run(["umount", place], capture_output=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"alpha": lambda _: 2.0}, "alpha is 2.0"),
        ({"drop": linear(1.0, 0.5, 3)}, "drop is 1.0"),
        ({"iteration": -1}, "iteration is -1"),
        ({"options": {"aplha": 0.5}}, "'aplha' is not an option of Rounds"),
        ({"options": {"no_dorp": ["embed"]}}, "'no_dorp' is not an option of Rounds; did you mean 'no_drop'?"),
        (
            {"options": {"alpha": 0.5}},
            r"options have 'alpha', which is a parameter of Rounds: Rounds\(..., alpha=...\)",
        ),
        ({"options": {"keep": ["typo"]}}, r'"typo"\] matches none of the 3 tensor names'),
        ({"options": {"importance": "nowhere.json"}}, "importance file nowhere.json cannot be read"),
        ({"options": {"layer_factors": "lines:1"}}, "layer factors"),
        ({"options": {"max_shard_size": "huge"}}, "size 'huge' is not understood"),
        ({"options": {"dtype": "bf61"}}, "dtype is 'bf61'"),
    ],
)
def test_rounds_are_checked_when_they_are_made(base: State, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        Rounds("base", **changes)


def test_rounds_of_a_base_that_is_not_there_are_refused(base: State) -> None:
    with pytest.raises(CheckpointError, match="base bsae does not exist"):
        Rounds("bsae")


def test_a_schedule_may_end_with_the_last_round(base: State) -> None:
    rounds = Rounds("base", alpha=listed([0.3]), options={"take": ["only.the.model.has"], "dtype": "float32"})
    with pytest.raises(ArgumentError, match="matches none"):
        rounds.merge(write_model(Path("sft"), tuned(base, 0)), "merged")
    rounds = Rounds("base", alpha=listed([0.3]))
    assert rounds.merge(Path("sft"), "merged").iteration == 1


def test_they_are_saved_and_restored(base: State) -> None:
    rounds = Rounds("base", seed=3)
    assert rounds.restored("rounds.json") == rounds
    rounds = rounds.merge(write_model(Path("sft"), tuned(base, 0)), "merged")
    rounds.save("rounds.json")
    assert Rounds("base", seed=3, alpha=0.7).restored("rounds.json") == Rounds(
        "base", "merged", 0.7, seed=3, iteration=1
    )
    assert sorted(path.name for path in Path().glob("rounds*")) == ["rounds.json"]
    with pytest.raises(ArgumentError, match="has base base and seed 3, and this Rounds has base and 0"):
        Rounds("base").restored("rounds.json")
    content = json.loads(Path("rounds.json").read_text())
    for damage in ("{", "[]", json.dumps(content | {"iteration": -1}), json.dumps(content | {"version": 2})):
        Path("rounds.json").write_text(damage)
        with pytest.raises(CheckpointError, match="is damaged"):
            Rounds("base", seed=3).restored("rounds.json")
