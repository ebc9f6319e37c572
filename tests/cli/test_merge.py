"""`imm-merge` as users run it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import mergekit_imm
from checkpoints import files_of, read_model, write_model
from commands import (
    HUNG,
    Command,
    Ended,
    subprocess_of,
)
from mergekit_imm import MergeReport, merge_checkpoints
from mergekit_imm.cli.main import main
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.cli.verify import verify_command
from mergekit_imm.numerics.native import COMPILING
from mergekit_imm.views.merge_summary import planned


def test_a_merge_ends_with_one_line_and_status_0(here: Path, merge: Command) -> None:
    ended = merge("base", "sft", "-o", "out")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("merged 5 tensors, 648 parameters, into out in ")
    assert ended.out.count("\n") == 1
    assert "GB/s" not in ended.out, "a rate of so few bytes says nothing"
    merge_checkpoints("base", "sft", "same")
    assert files_of(here / "out") == files_of(here / "same")


def test_the_home_folder_is_expanded(here: Path, merge: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir("/")
    assert merge("~/base", "~/sft", "-o", "~/out").status == 0
    assert (here / "out" / "model.safetensors").exists()


OPTIONS: list[tuple[list[str], dict[str, object]]] = [
    (
        [],
        {
            "alpha": 0.5,
            "drop": 0.2,
            "seed": 0,
            "iteration": 0,
            "importance": None,
            "reference": "start",
            "dtype": "base",
            "max_shard_size": None,
            "keep": [],
            "take": [],
            "no_drop": [],
            "vocab": "strict",
            "allow_nonfinite": False,
            "copy_code": False,
        },
    ),
    (
        ["--alpha", "0.3", "--drop", "0", "--seed", "-7", "--iteration", "3"],
        {"alpha": 0.3, "drop": 0.0, "seed": -7, "iteration": 3},
    ),
    (["--importance", "importance.json"], {"importance": {"0": 1.0, "1": 3.0}}),
    (["--reference", "base", "--dtype", "float16"], {"reference": "base", "dtype": "float16"}),
    (["--max-shard-size", "1.5KB"], {"max_shard_size": 1500}),
    (["--keep", "norm", "--keep", "lm_head", "--take", "embed"], {"keep": ["norm", "lm_head"], "take": ["embed"]}),
    (["--no-drop", "norm", "--no-drop", "embed"], {"no_drop": ["norm", "embed"]}),
    (["--allow-nonfinite", "--copy-code"], {"allow_nonfinite": True, "copy_code": True}),
]


@pytest.mark.parametrize(("arguments", "expected"), OPTIONS, ids=[" ".join(options) for options, _ in OPTIONS])
def test_options_become_parameters(
    here: Path, merge: Command, arguments: list[str], expected: dict[str, object]
) -> None:
    (here / "importance.json").write_text('{"0": 1.0, "1": 3.0}')
    parameters = json.loads(merge("base", "sft", "-o", "out", "--dry-run", "--json", *arguments).out)["parameters"]
    assert {key: parameters[key] for key in expected} == expected


def test_start_workers_and_device_are_taken(here: Path, merge: Command) -> None:
    merge("base", "sft", "-o", "first")
    arguments = ["--start", "first", "--workers", "3", "--device", "cpu", "--dry-run", "--json"]
    report = json.loads(merge("base", "sft", "-o", "out", *arguments).out)
    assert (report["parameters"]["iteration"], report["workers"], report["device"]) == (1, 3, "cpu")
    assert any("start" in kind["read"] for kind in report["kinds"])


def test_every_argument_of_the_function_has_an_option_and_every_option_stands_in_the_help(merge: Command) -> None:
    ended = merge("--help")
    assert (ended.status, ended.err) == (0, "")
    assert merge("-h").out == ended.out
    options = {option for each in merge_command.params for option in each.opts if option.startswith("-")}
    assert all(option in ended.out for option in options)
    arguments = set(inspect.signature(merge_checkpoints).parameters) - {"base", "sft", "out", "progress"}
    assert {f"--{name.replace('_', '-')}" for name in arguments} <= options
    assert max(map(len, ended.out.splitlines())) <= 110


def test_every_option_of_verify_stands_in_its_help(check: Command) -> None:
    ended = check("--help")
    assert (ended.status, ended.err) == (0, "")
    options = {option for each in verify_command.params for option in each.opts if option.startswith("-")}
    assert all(option in ended.out for option in options)
    assert {"--base", "--start", "--sft", "--sample", "--device", "--workers", "--json", "--quiet"} <= options


def test_the_version_is_that_of_the_package(merge: Command, check: Command) -> None:
    for ended in (merge("--version"), check("--version")):
        assert (ended.status, ended.err) == (0, "")
        assert mergekit_imm.__version__ in ended.out


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["--quiet"], ["--start", "base", "--iteration", "1"]])
def test_json_is_one_document_with_the_fields_of_the_report(here: Path, merge: Command, arguments: list[str]) -> None:
    for status in ["dry run"] * 2 if "--dry-run" in arguments else ["merged", "already merged"]:
        ended = merge("base", "sft", "-o", "out", "--json", *arguments)
        assert (ended.status, ended.err) == (0, "")
        report = json.loads(ended.out, parse_constant=pytest.fail)
        assert list(report) == [field.name for field in fields(MergeReport)]
        assert report["status"] == status
        assert report["tensors"] == {"merged": 5, "kept": 0, "taken": 0, "copied": 0}
        assert {"plan", "total"} <= set(report["seconds"])


def test_quiet_prints_nothing(here: Path, merge: Command) -> None:
    for _ in range(2):  # the second run finds it merged
        assert merge("base", "base", "-o", "out", "--quiet") == Ended(0, "", "")


def test_notes_go_to_standard_error(here: Path, merge: Command) -> None:
    ended = merge("base", "base", "-o", "out")
    assert ended.err == "note: BASE and SFT are the same model; the result is that model\n"
    assert "note" not in ended.out


def test_a_dry_run_writes_nothing_and_prints_what_would_be_read_and_written(here: Path, merge: Command) -> None:
    before = files_of(here)
    ended = merge("base", "sft", "-o", "out", "--dry-run", "--keep", "norm", "--dtype", "float16")
    assert (ended.status, ended.err) == (0, "")
    assert files_of(here) == before
    assert sorted(path.name for path in here.iterdir()) == ["base", "sft"]
    expected = [
        "would merge 648 parameters (4 merged, 1 kept) into out",
        "base   base",
        "sft    sft",
        "alpha 0.5",
        "drop 0.2",
        "seed 0",
        "iteration 0",
        "model.layers.*.mlp.weight",
        "keep the base's",
        "BF16",
        "F16",
        "reads",
        "writes",
        "to model.safetensors",
        "2 other files from sft: templates/chat.jinja, tokenizer.json",
        'config.json: dtype = "float16"',
        "left out of base: optimizer.pt",
        "memory at most about",
        "disk needed",
        "free",
    ]
    assert [words for words in expected if words not in ended.out] == []
    assert ended.out.splitlines()[-1] == "nothing was written"


def test_a_dry_run_says_that_its_memory_is_a_bound(here: Path) -> None:
    """What a first run takes; torch, which only a GPU needs, is not in it."""
    report = merge_checkpoints("base", "sft", "out", dry_run=True, workers=2)
    line = f"  memory at most about {report.memory / 1e6:.1f} MB, with 2 workers on cpu"
    assert line in planned(report, "base", "sft", None).splitlines()
    on_gpu = line.replace(" MB", " MB and what torch needs").replace("cpu", "cuda:1")
    assert on_gpu in planned(replace(report, device="cuda:1"), "base", "sft", None).splitlines()


def test_what_a_dry_run_says_is_what_happens(here: Path, merge: Command) -> None:
    arguments = ["base", "sft", "-o", "out", "--json", "--take", "norm", "--max-shard-size", "1KB"]
    planned = json.loads(merge(*arguments, "--dry-run").out)
    done = json.loads(merge(*arguments).out)
    same = set(planned) - {"status", "seconds", "disk_free"}
    assert {key: planned[key] for key in same} == {key: done[key] for key in same}
    assert sorted(done["files"]) == sorted(path.name for path in (here / "out").glob("*.safetensors"))
    assert done["bytes_written"] == sum((here / "out" / name).stat().st_size for name in done["files"])


def test_the_same_merge_again_is_already_merged(here: Path, merge: Command) -> None:
    merge("base", "sft", "-o", "out")
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    for arguments in ([], ["--overwrite"], ["--restart"], ["--dry-run"]):
        ended = merge("base", "sft", "-o", "out", *arguments)
        assert (ended.status, ended.err) == (0, "")
        assert "out already merged" in ended.out
        assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_overwrite_replaces_an_output(here: Path, merge: Command) -> None:
    merge("base", "sft", "-o", "out")
    before = files_of(here / "out")
    ended = merge("base", "sft", "-o", "out", "--alpha", "0.1")
    assert ended.status == 1
    assert "--overwrite" in ended.error
    assert files_of(here / "out") == before
    assert merge("base", "sft", "-o", "out", "--alpha", "0.1", "--overwrite").status == 0
    merge("base", "sft", "-o", "fresh", "--alpha", "0.1")
    assert files_of(here / "out") == files_of(here / "fresh") != before
    assert sorted(path.name for path in here.iterdir()) == ["base", "fresh", "out", "sft"]


def test_restart_starts_over(here: Path, merge: Command) -> None:
    (here / "out.partial").mkdir()
    (here / "out.partial" / "notes.txt").write_text("mine")
    ended = merge("base", "sft", "-o", "out")
    assert ended.status == 1
    assert "out.partial" in ended.error
    assert "--restart" in ended.error
    assert merge("base", "sft", "-o", "out", "--restart").status == 0
    assert sorted(path.name for path in here.iterdir()) == ["base", "out", "sft"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone", "sft", "-o", "out"], ["base gone does not exist"]),
        (["base", "sft", "-o", "base"], ["output base would replace an input (base base); give another output"]),
        (["base", "sft", "-o", "out", "--seed", "1", "--keep", "nrom"], ["--keep 'nrom' matches none"]),
        (["base", "sft", "-o", "out", "--start", "sft2"], ["start sft2 does not exist"]),
        (["base", "sft", "-o", "out", "--importance", "gone.json"], ["gone.json", "cannot be read"]),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--quiet"], ["--json"]], ids=str)
def test_a_refusal_is_one_line_and_status_1(
    here: Path, merge: Command, arguments: list[str], words: list[str], more: list[str]
) -> None:
    ended = merge(*arguments, *more)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
    assert [word for word in words if word not in ended.error] == []
    assert sorted(path.name for path in here.iterdir()) == ["base", "sft"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["base", "sft", "-o", "out", "--alhpa", "0.5"], "--alhpa"),
        (["base", "sft", "-o", "out", "more"], "more"),
        (["base", "sft"], "-o"),
        (["base", "-o", "out"], "SFT"),
        ([], "BASE"),
        (["base", "sft", "-o", "out", "--alpha", "1.5"], "1.5"),
        (["base", "sft", "-o", "out", "--alpha", "half"], "half"),
        (["base", "sft", "-o", "out", "--alpha", "nan"], "nan"),
        (["base", "sft", "-o", "out", "--alpha"], "--alpha"),
        (["base", "sft", "-o", "out", "--drop", "1"], "use --alpha 1"),
        (["base", "sft", "-o", "out", "--seed", "1.5"], "--seed"),
        (["base", "sft", "-o", "out", "--iteration", "-1"], "--iteration"),
        (["base", "sft", "-o", "out", "--dtype", "float8"], "float8"),
        (["base", "sft", "-o", "out", "--reference", "sft"], "--reference"),
        (["base", "sft", "-o", "out", "--vocab", "larger"], "--vocab"),
        (["base", "sft", "-o", "out", "--workers", "0"], "--workers"),
    ],
)
def test_wrong_usage_is_status_2(here: Path, merge: Command, arguments: list[str], word: str) -> None:
    ended = merge(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert word in ended.error
    assert "Usage: imm-merge" in ended.err
    assert sorted(path.name for path in here.iterdir()) == ["base", "sft"]


def test_wrong_usage_of_verify_is_status_2(check: Command) -> None:
    for arguments in ([], ["out", "more"], ["out", "--sample", "0"], ["out", "--sample", "2"], ["out", "--nothing"]):
        ended = check(*arguments)
        assert (ended.status, ended.out) == (2, "")
        assert ended.error


def test_what_nobody_thought_of_is_one_line_too(here: Path, merge: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("mergekit_imm.engine.merge.merge_checkpoints", fail)
    ended = merge("base", "sft", "-o", "out")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("error: unexpected ZeroDivisionError: first line second line; ")
    assert "--debug" in ended.err


def test_an_interruption_that_click_turns_into_its_own_is_status_130(
    here: Path, merge: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit_imm.engine.merge.merge_checkpoints", fail)
    ended = merge("base", "sft", "-o", "out")
    assert ended.status == 130
    assert "interrupted" in ended.error


def test_a_traceback_is_shown_with_debug_only(here: Path) -> None:
    ended = subprocess_of("merge", "gone", "sft", "-o", "out")
    assert (ended.status, ended.out) == (1, "")
    assert ended.error.startswith("base gone does not exist")
    assert ended.err.count("\n") == 1
    ended = subprocess_of("merge", "gone", "sft", "-o", "out", "--debug")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("Traceback")
    assert "CheckpointError: base gone does not exist" in ended.err.splitlines()[-1]


def test_a_reader_that_goes_away_is_no_traceback(here: Path) -> None:
    merge_checkpoints("base", "sft", "out")
    arguments = [sys.executable, "-m", "mergekit_imm", "merge", "base", "sft", "-o", "out", "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(HUNG) == 1


def test_a_report_that_cannot_be_written_is_no_traceback(here: Path) -> None:
    for arguments in (
        ["merge", "base", "sft", "-o", "out", "--json"],
        ["merge", "base", "sft", "-o", "out"],
        ["verify", "out"],
    ):
        with open("/dev/full", "w") as full:  # noqa: PTH123
            ended = subprocess.run(
                [sys.executable, "-m", "mergekit_imm", *arguments], stdout=full, stderr=-1, text=True
            )
        assert ended.returncode == 1
        assert ended.stderr == (
            "error: standard output cannot be written: No space left on device; everything else is done\n"
        )
    assert (here / "out" / "imm_recipe.json").exists()


def test_the_scripts_are_these_commands() -> None:
    scripts = {each.name: each.value for each in entry_points(group="console_scripts") if each.name.startswith("imm-")}
    assert scripts["imm-merge"] == "mergekit_imm.__main__:imm_merge"
    assert scripts["imm-verify"] == "mergekit_imm.__main__:imm_verify"


def test_the_module_runs_both_commands() -> None:
    for name in ("merge", "verify"):
        ended = subprocess_of(name, "--version")
        assert (ended.status, ended.err) == (0, "")
        assert ended.out == f"imm-{name}, version {mergekit_imm.__version__}\n"


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["mrege"], 2), (["--help"], 0)], ids=str)
def test_the_module_names_its_commands(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit_imm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == status
    assert "merge" in (printed.err if status else printed.out)
    assert "verify" in (printed.err if status else printed.out)
    assert bool(printed.out) != bool(printed.err)


IMPORTS = """
import sys
from mergekit_imm.cli.main import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
found = {name.partition(".")[0] for name in sys.modules}
print(*sorted(found & {"torch", "transformers", "huggingface_hub", "numba", "numpy", "safetensors"}), file=sys.stderr)
"""


def test_what_is_not_needed_is_not_imported(here: Path) -> None:
    def imported(*arguments: str) -> set[str]:
        ended = subprocess_of(*arguments, code=IMPORTS)
        assert ended.status == 0, ended.err
        return set(ended.err.splitlines()[-1].split())

    arguments = ["merge", "base", "sft", "-o", "out"]
    assert imported("merge", "--help") == set()
    assert imported(*arguments, "--dry-run") <= {"numpy", "safetensors"}
    assert imported(*arguments) == {"numpy", "safetensors"}
    assert imported("verify", "out") == {"numpy", "safetensors"}


def test_a_read_only_install_without_a_home_works_and_says_so(here: Path) -> None:
    package = Path(mergekit_imm.__file__).parent
    install = here / "install" / "mergekit_imm"
    shutil.copytree(package, install, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (install, install / "numerics", install / "transforms"):
        (folder / "__pycache__").write_text("a file, so that nothing can be cached, whoever runs this")
    (here / "home").write_text("a file, too")
    environment = {**os.environ, "HOME": str(here / "home"), "PYTHONPATH": str(install.parent)}
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    arguments = ["merge", "base", "sft", "-o", "out"]
    ended = subprocess_of(*arguments, env=environment)
    assert ended.status == 0
    compiles, no_folder = ended.err.splitlines()
    assert compiles == COMPILING
    assert no_folder.startswith("note: no folder to keep")
    assert "NUMBA_CACHE_DIR" in no_folder
    merge_checkpoints("base", "sft", "same")
    assert files_of(here / "out") == files_of(here / "same")
    # A folder that can be written keeps them, and the next run says nothing.
    environment["NUMBA_CACHE_DIR"] = str(here / "cache")
    assert subprocess_of(*arguments[:-1], "two", env=environment).err == f"{compiles}\n"
    assert subprocess_of(*arguments[:-1], "three", env=environment).err == ""


def test_a_dry_run_and_a_note_show_which_names_were_taken_for_which(here: Path, merge: Command) -> None:
    state = read_model(here / "sft")
    write_model(here / "renamed", {f"language_model.{name}": tensor for name, tensor in state.items()})
    shown = merge("base", "renamed", "-o", "out", "--dry-run")
    assert f"\n  {len(state)} tensors 'language_model.*' of sft are '*' in base\n" in shown.out
    done = merge("base", "renamed", "-o", "out")
    assert (done.status, f"note: {len(state)} names of sft renamed differ from those of base base" in done.err) == (
        0,
        True,
    )
