"""A real full disk, of every size (page by page) at which some write of a merge fails.

The message is one line, what was written is kept, and with more room the same call gives the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import files_of, random_state, write_model
from commands import CONFIG, subprocess_of
from mergekit_imm import MergeError, OutputError, Rounds, merge_checkpoints
from mergekit_imm.loop.commands import CommandError
from mergekit_imm.loop.run import run_loop
from mergekit_imm.loop.state import Settings, State
from mergekit_imm.output import journal
from mergekit_imm.views.loop_summary import plot

PAGE = 4096
FULL = "No space left on device; free some space"
KEPT = "what was written is kept in {}; run the same command again to resume"
FIRST = "model-00001-of-00002.safetensors"  # the disk is too small for the second, or the merge is refused
ENOUGH = "size=100m,nr_inodes=1000"


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Base and sft in the current folder, and their merge, which generates its own config and index.

    Enough tensors for a journal of more than a page.
    """
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(("base", "sft")):
        state = random_state({f"layers.{i}.weight": (4, 4) for i in range(90)}, seed=seed)
        config = CONFIG | {"dtype": "float32"}
        shards = [list(state)[:45], list(state)[45:]]
        write_model(tmp_path / role, state, shards=shards, config=config, side={"tokenizer.json": "{}"})
    merge_checkpoints("base", "sft", "whole")
    return tmp_path / "whole"


def fails(out: Path, *, overwrite: bool) -> bool:
    """Whether a merge fails for lack of space; if so, check the one-line message and that OUT is unchanged."""
    before = files_of(out)
    try:
        merge_checkpoints("base", "sft", out, overwrite=overwrite)
    except OutputError as error:
        message = str(error)
        assert message.isprintable()
        partial = out.with_name(out.name + ".partial")
        if "free; free some space or give an OUT" not in message:  # refused before it began
            assert FULL in message
            assert (KEPT.format(partial) in message) == (partial.exists() and any(partial.iterdir()))
        assert files_of(out) == before
        return True
    return False


def states(partial: Path, whole: Path) -> dict[str, str]:
    """Return whether each file of a merge is lacking, begun, or done."""
    wanted = files_of(whole)
    there = files_of(partial) if partial.exists() else {}
    found = {name: "lacking" if name not in there else "begun" for name in [*wanted, journal.JOURNAL]}
    return found | {name: "done" for name, content in there.items() if wanted.get(name) == content}


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("what", ["pages", "files"])
def test_every_write_that_finds_no_room(
    whole: Path, mounted: Callable[[str], Path], what: str, overwrite: bool
) -> None:
    place = mounted(ENOUGH)
    out, partial, expected = place / "out", place / "out.partial", files_of(whole)
    least = (
        merge_checkpoints("base", "sft", out, dry_run=True).disk_needed // PAGE
    )  # with less, the merge does not begin
    said = ""
    seen: dict[str, set[str]] = {}
    tried = range(least, 100) if what == "pages" else range(1, 100)
    for number in tried:
        if overwrite:
            write_model(out, random_state({"old": (2, 2)}), config=CONFIG)
        # Existing files take space too. A tmpfs counts its root folder as a file.
        used = (0, 1) if not overwrite else (2, 4)
        room = f"size={(used[0] + number) * PAGE}" if what == "pages" else f"nr_inodes={used[1] + number}"
        mounted(f"remount,{room}")
        failed = fails(out, overwrite=overwrite)
        for name, state in states(partial, whole).items():
            seen.setdefault(name, set()).add(state)
        if failed and what == "pages" and not overwrite and not said and (partial / "tokenizer.json").exists():
            said = subprocess_of("merge", "base", "sft", "-o", out).error
        mounted(f"remount,{ENOUGH}")
        assert merge_checkpoints("base", "sft", out, overwrite=overwrite).status == (
            "merged" if failed else "already merged"
        )
        assert files_of(out) == expected
        assert [path.name for path in place.iterdir()] == ["out"]
        shutil.rmtree(out)
        if not failed:
            break
    # Each file was once the first without space.
    assert {name for name, found in seen.items() if "lacking" in found} == {*expected, journal.JOURNAL}
    if what == "pages" and not overwrite:
        assert said.startswith(f"{out} cannot be written: {FULL}")
    if what == "pages":
        assert {name for name, found in seen.items() if "begun" in found} >= {*expected, journal.JOURNAL} - {FIRST}


def test_a_loop_on_a_full_disk_goes_on_when_there_is_room(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    """Every size: its state, its logs, the output of its command, the merges."""
    place, base = mounted(ENOUGH), tmp_path / "base"
    write_model(base, random_state({"w": (8, 8)}), config=CONFIG)
    settings = Settings(base=str(base), train="mkdir -p {output} && cp -r {model}/* {output}/", rounds=2, alpha="0.5")
    expected = run_loop(settings, tmp_path / "run")
    models = {str(path.relative_to(tmp_path)): path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    said = []
    for pages in range(1, 100):
        mounted(f"remount,size={pages * PAGE}")
        try:
            run_loop(settings, place / "run")
            break
        except MergeError as error:
            said.append(error)
        mounted(f"remount,{ENOUGH}")
        found = run_loop(settings, place / "run")
        assert found.done == expected.done
        assert {name: (place / name).read_bytes() for name in models} == models
        shutil.rmtree(place / "run")
    assert pages > 10
    assert {type(error) for error in said} == {CommandError, OutputError}
    for message in map(str, said):
        assert message.isprintable()
        assert "No space left on device" in message or "the disk has" in message


def test_pictures_and_rounds_on_a_full_disk(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    write_model(tmp_path / "base", random_state({"w": (8, 8)}), config=CONFIG)
    place = mounted("size=4k")
    state = State(Settings(base="base", train="{output}", rounds=1), "base", metrics={"base": {"score": 1.0}})
    with pytest.raises(OutputError, match=f"{place} cannot be written: {FULL}"):
        plot(state, place)
    for path in place.iterdir():
        path.unlink()
    (place / "filler").write_bytes(b"x")
    with pytest.raises(OutputError, match=rf"{place}/rounds.json cannot be written: {FULL}"):
        Rounds(tmp_path / "base").save(place / "rounds.json")
    assert not (place / "rounds.json").exists()
