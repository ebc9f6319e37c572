"""Outputs that are refused."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch

from checkpoints import files_of, random_state, write_model
from commands import subprocess_of
from mergekit_imm.errors import OutputError
from mergekit_imm.output import direct_io, journal, paths, write_errors
from refused import (
    CONFIG,
    MODEL,
    PARTIAL,
    SHAPES,
    SIDE,
    UP0,
    Models,
    everything,
    interrupt,
    linked,
)


def test_an_output_that_is_a_file_is_refused(models: Models) -> None:
    models.out.write_text("mine")
    models.refused(OutputError, r"output \S+out is a file; an output is a folder", overwrite=True)


@pytest.mark.parametrize("target", ["elsewhere", "gone"])
def test_an_output_that_is_a_link_is_refused(models: Models, target: str) -> None:
    (models.folder / "elsewhere").mkdir()
    models.out.symlink_to(models.folder / target)
    models.refused(OutputError, r"output \S+out is a link; give the folder it points to", overwrite=True)


@pytest.mark.parametrize("out", ["..", ".", "", "sub/..", "/"])
def test_an_output_without_a_name_of_its_own_is_refused(
    models: Models, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models.folder / "sub").mkdir()
    monkeypatch.chdir(models.folder / "sub")
    models.refused(OutputError, r"output .* has no name of its own; give a folder", out=out, overwrite=True)


def test_an_output_that_is_a_mount_point_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    models.out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == models.out)
    models.refused(OutputError, r"output \S+out is a mount point.*give a folder inside it")


@pytest.mark.parametrize("role", ["base", "sft", "start"])
def test_an_output_that_is_an_input_is_refused(models: Models, role: str) -> None:
    start = write_model(models.folder / "start", random_state(SHAPES), config=CONFIG)
    models.refused(
        OutputError,
        rf"output \S+{role} would replace an input \({role} \S+{role}\); give another output",
        out=models.folder / role,
        start=start,
        iteration=1,
        overwrite=True,
    )


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "relative",
        "input is a link",
        "input through a link",
        "output through a link",
        "a file",
        "its file is a link",
        "its tokenizer is a link",
    ],
)
def test_an_input_inside_the_output_is_refused(models: Models, kind: str) -> None:
    sft, out = linked(models, kind)
    models.refused(
        OutputError, r"output \S+out would replace an? \S.*input \(sft .*give another", sft=sft, out=out, overwrite=True
    )


def test_an_input_inside_the_folder_that_the_output_is_built_in_is_refused(models: Models) -> None:
    (models.folder / PARTIAL).mkdir()
    sft = models.sft.rename(models.folder / PARTIAL / "sft")
    models.refused(OutputError, r"out\.partial would replace a folder around an input \(sft", sft=sft, restart=True)


def test_an_importance_file_inside_the_output_survives(models: Models) -> None:
    models.merge()
    path = models.out / "importance.json"
    path.write_text(json.dumps({"model.layers.0": 1.0, "model.layers.1": 2.0}))
    models.refused(
        OutputError,
        r"output \S+out would replace a folder around an input \(.*importance",
        importance=path,
        overwrite=True,
    )


def test_an_output_inside_an_input_is_fine_and_not_part_of_it(models: Models) -> None:
    models.merge()
    first, second = models.base / "merged", models.sft / "runs-of-mine" / "merged"
    for out in (first, second, models.base / "again"):
        models.merge(out=out)
        assert files_of(out) == files_of(models.out)
    models.merge(out=first, alpha=0.3, overwrite=True)
    models.merge(alpha=0.3, overwrite=True)
    assert files_of(first) == files_of(models.out)


def test_an_unfinished_output_inside_an_input_is_not_part_of_it(models: Models) -> None:
    models.merge(out=models.folder / "before")
    interrupt(models, out=models.base / "other")
    (models.base / "other.partial" / "merges.txt").write_text("copied just before the interruption")
    models.merge()
    assert files_of(models.out) == files_of(models.folder / "before")


def test_what_an_output_inside_an_input_held_is_not_part_of_it(models: Models) -> None:
    models.merge()
    inside = models.base / "merged"
    inside.mkdir()
    (inside / "vocab.txt").write_text("something else")
    models.merge(out=inside, overwrite=True)
    assert files_of(inside) == files_of(models.out)


def test_an_output_that_holds_something_is_refused_without_overwrite(models: Models) -> None:
    models.out.mkdir()
    assert models.merge(dry_run=True).status == "dry run"
    (models.out / "notes.txt").write_text("mine")
    models.refused(
        OutputError, r"output \S+out exists and is not empty \(notes\.txt\); .*--overwrite, which deletes all"
    )
    assert models.merge(overwrite=True).status == "merged"
    assert "notes.txt" not in files_of(models.out)


@pytest.mark.parametrize("name", ["model.safetensors", "deep/pytorch_model.bin", "pytorch_model_fsdp_0/__0_0.distcp"])
def test_overwrite_does_not_delete_models_in_sub_folders(models: Models, name: str) -> None:
    """Such as the checkpoints of a training, days of work, even where a merge lay before."""
    models.merge()
    trained = models.out / "checkpoint-20" / name
    trained.parent.mkdir(parents=True)
    trained.write_text("days of work")
    for overwrite in (False, True):
        models.refused(
            OutputError,
            r"out holds other models, checkpoint-20/: --overwrite would delete it; give another output",
            overwrite=overwrite,
            alpha=0.125,
        )
    assert trained.read_text() == "days of work"
    trained.unlink()
    assert models.merge(overwrite=True, alpha=0.125).status == "merged"


def test_an_output_of_another_recipe_is_refused_without_overwrite(models: Models) -> None:
    models.merge(alpha=0.3)
    models.refused(OutputError, r"exists and holds another merge \(parameters\.alpha: .*--overwrite")
    assert models.merge(alpha=0.3).status == "already merged"


def test_an_empty_output_is_fine(models: Models) -> None:
    models.out.mkdir()
    assert models.merge().status == "merged"


def test_an_output_in_the_home_of_nobody_is_refused(models: Models) -> None:
    models.refused(OutputError, r"output ~nobody\.here/out", out="~nobody.here/out")


def test_an_output_below_a_file_is_refused(models: Models) -> None:
    (models.folder / "file").write_text("mine")
    models.refused(OutputError, r"file.*Not a directory", out=models.folder / "file" / "out")


def test_an_unfinished_merge_of_another_recipe_is_refused(models: Models) -> None:
    interrupt(models, alpha=0.3)
    models.refused(
        OutputError,
        r"out\.partial is an unfinished merge of another recipe \(parameters\.alpha: 0\.3, now 0\.5\)"
        r"; finish that one, or --restart to start over",
    )
    models.merge(out=models.folder / "fresh")
    models.merge(restart=True)
    assert files_of(models.out) == files_of(models.folder / "fresh")
    assert not (models.folder / PARTIAL).exists()


def test_an_unfinished_merge_of_an_input_that_changed_is_refused(models: Models) -> None:
    interrupt(models)
    models.change("sft", {UP0: torch.ones(8, 8, dtype=torch.bfloat16)})
    models.refused(
        OutputError,
        r"unfinished merge of another recipe \(inputs\.sft\.files\.model\.safetensors has changed.*--restart",
    )


def test_a_folder_of_others_in_the_place_of_the_unfinished_merge_is_refused(models: Models) -> None:
    partial = models.folder / PARTIAL
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    models.refused(OutputError, r"out\.partial exists and is not an unfinished merge; move it away, or --restart")
    models.merge(restart=True)
    assert "notes.txt" not in files_of(models.out)


def test_a_file_in_the_place_of_the_unfinished_merge_is_refused(models: Models) -> None:
    (models.folder / PARTIAL).write_text("mine")
    models.refused(OutputError, r"out\.partial")


@pytest.mark.parametrize("restart", [False, True])
def test_a_link_in_the_place_of_the_unfinished_merge_is_refused(models: Models, restart: bool) -> None:
    elsewhere = models.folder / "elsewhere"
    elsewhere.mkdir()
    if restart:
        (elsewhere / "notes.txt").write_text("mine")
    (models.folder / PARTIAL).symlink_to(elsewhere)
    models.refused(OutputError, r"out\.partial.* is a link", restart=restart)


def test_a_merge_that_was_cut_off_at_its_first_byte_goes_on(models: Models) -> None:
    partial = models.folder / PARTIAL
    partial.mkdir()
    (partial / (journal.JOURNAL + ".new")).write_bytes(b'{"form')
    assert models.merge().status == "merged"
    assert set(files_of(models.out)) == {MODEL, "config.json", "imm_recipe.json", "imm_report.json", "README.md", *SIDE}


def test_a_merge_that_another_process_writes_is_refused(models: Models) -> None:
    interrupt(models)
    with paths.locked(models.folder / PARTIAL):
        models.refused(OutputError, r"out\.partial is being written by another merge; wait", streaming=True)
    assert models.merge().status == "merged"


FULL = """
from mergekit_imm.cli.main import main
from mergekit_imm.output import write_errors
write_errors.disk_of = lambda _: (1, 1)
main()
"""


def test_too_little_space_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = models.merge(dry_run=True).disk_needed
    monkeypatch.setattr(write_errors, "disk_of", lambda _: (1, needed - 1))
    message = r"output \S+out needs .* and the disk has .* free; free some space or give"
    models.refused(OutputError, message, streaming=True)
    assert re.match(message, models.merge(dry_run=True).refused)
    ended = subprocess_of("merge", models.base, models.sft, "--dry-run", "-o", models.out, code=FULL)
    assert ended.status == 1
    assert re.match(message, ended.error)
    assert "would merge" in ended.out
    assert not models.out.exists()
    monkeypatch.setattr(write_errors, "disk_of", lambda _: (1, needed))
    assert models.merge().status == "merged"


def test_a_disk_that_fills_up_is_no_end(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    inputs = everything(models.base) | everything(models.sft)
    with monkeypatch.context() as patch:
        patch.setattr(direct_io, "write_at", full)
        with pytest.raises(OutputError, match=r"\Sout.* cannot be written: No space left.*the same command again"):
            models.merge()
    assert not models.out.exists()
    assert models.merge().status == "merged"
    assert everything(models.base) | everything(models.sft) == inputs
