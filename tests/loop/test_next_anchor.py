"""A moving anchor from the reading of the merge before it: as by a merge of its own, cut off anywhere."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from checkpoints import files_of, random_state, write_model
from loops import CONFIG, asked
from mergekit_imm.checkpoint.reader import Files
from mergekit_imm.loop import next_anchor
from mergekit_imm.loop.next_anchor import NextAnchor
from mergekit_imm.loop.run import run_loop
from mergekit_imm.output import direct_io
from thorough import others


@pytest.fixture
def model(base: str) -> str:
    """Several segments, a tensor that is copied, and one that is kept."""
    state = random_state({"model.embed.weight": (8, 4), "model.layers.0.w": (1100, 1000), "model.norm": (64,)})
    state = {name: tensor.float() for name, tensor in state.items()}
    write_model(Path(base), state, config=CONFIG, side={"tokenizer.json": "{}"})
    return base


def settings(base: str, **changes: Any) -> Any:
    return asked(base, anchor="ema:0.75", drop="0.5", keep=("norm",), **changes)


def results(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(run).items() if not name.endswith(".log")}


@pytest.fixture
def apart(model: str) -> dict[str, bytes]:
    """What a loop leaves whose anchors are merges of their own."""
    with patch.object(NextAnchor, "add", lambda *_: None):
        run_loop(settings(model), "run")
    found = results(Path("run"))
    Path("run").rename("apart")
    return found


def test_the_files_are_those_of_a_merge_of_its_own(model: str, apart: dict[str, bytes]) -> None:
    read: list[tuple[str, str]] = []
    placed = Files.read_placed

    def reading(files: Files, role: str, tensor: Any, *rest: Any) -> int:
        read.append((str(files._inputs[role].path(tensor)), tensor.name))
        return placed(files, role, tensor, *rest)

    with patch.object(Files, "read_placed", reading):
        run_loop(settings(model), "run")
    assert results(Path("run")) == apart
    counts = [read.count((f"run/round-1/{each}/model.safetensors", "model.layers.0.w")) for each in ("anchor", "sft")]
    assert counts[0] == counts[1] > 0  # once, in the merge of round 1
    assert not list(Path("run").rglob("*.begun"))


class Killed(BaseException):
    pass


@contextmanager
def killed(place: str, after: int) -> Iterator[None]:
    """Nothing is tidied up, as after kill -9."""
    calls = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return call(*given, **named)

        return counting

    from mergekit_imm.engine import stream

    holder: Any = {"add": NextAnchor, "hand_over": NextAnchor, "Journal": next_anchor, "recipes_of": next_anchor}.get(
        place
    )
    holder = holder or {"_become_unfinished": NextAnchor, "_read_back": stream, "rename": Path}[place]
    with patch.object(holder, place, wrapped(getattr(holder, place))):
        tidy = NextAnchor.discard
        begun = patch.object(NextAnchor, "discard", lambda self: tidy(self) if not self._files else None)
        with begun, suppress(Killed):
            yield


PLACES = [("add", 1), ("add", 4), ("hand_over", 0), ("_become_unfinished", 1), ("recipes_of", 0), ("_read_back", 1)]
MORE = [("add", 0), ("add", 2), ("Journal", 0), ("_read_back", 0), ("_read_back", 2), ("_become_unfinished", 0)]


@pytest.mark.parametrize(("place", "after"), [*PLACES, *others(*MORE)])
def test_a_killed_loop_resumes(place: str, after: int, model: str, apart: dict[str, bytes]) -> None:
    with killed(place, after):
        run_loop(settings(model), "run")
        raise AssertionError("not killed")
    run_loop(settings(model), "run")
    assert results(Path("run")) == apart
    assert not list(Path("run").rglob("*.begun")) + list(Path("run").rglob("*.partial"))


@pytest.mark.parametrize("room", [next_anchor.SPARE, 1 << 40])
def test_a_full_disk_leaves_it_to_its_own_merge(room: int, model: str, apart: dict[str, bytes]) -> None:
    """A disk with less room than the merge may need for its other files, or one that fills up."""
    opened, begun = direct_io.open_output, []

    def full(path: Path, size: int | None) -> direct_io.Handle:
        if path.parent.name.endswith(".begun"):
            begun.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, size)

    with patch.object(direct_io, "open_output", full), patch.object(next_anchor, "disk_of", lambda _: (0, room)):
        run_loop(settings(model), "run")
    assert bool(begun) == (room > next_anchor.SPARE)
    assert results(Path("run")) == apart


def test_a_refused_merge_leaves_no_anchor(model: str) -> None:
    worse = "echo '{{\"score\": -{round}}}' > {json} # {model}".replace("{{", "{").replace("}}", "}")
    state = run_loop(settings(model, evaluate=worse, gate="score", retry=(0.9,)), "run")
    assert state.stopped.startswith("round 1 was not accepted")
    assert sorted(path.name for path in Path("run").glob("round-*")) == ["round-0", "round-1"]
    assert Path("run/round-1/anchor").is_dir()
