"""The help of every command, as a stranger reads it."""

from __future__ import annotations

import re

import click
import pytest

import mergekit_imm
from commands import Command, subprocess_of
from mergekit_imm.cli.analyze import analyze_command
from mergekit_imm.cli.help import HEADINGS
from mergekit_imm.cli.loop import loop_command
from mergekit_imm.cli.main import COMMANDS, module_command
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.cli.verify import verify_command

PROGRAMS = (merge_command, verify_command, loop_command, *analyze_command.commands.values())
EVERY = (*PROGRAMS, analyze_command, module_command)


def named(command: click.Command) -> str:
    return str(command.name)


def sections(text: str) -> dict[str, str]:
    """The parts of a help by their headings."""
    parts = re.split(r"^(\w[\w ]*):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("which", EVERY, ids=named)
def test_no_line_is_wider_than_the_terminal(
    which: click.Command, width: int, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    ended = command(which, "--help")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [line for line in lines if len(line) > min(width, 110)] == []
    assert [line for line in lines if re.search(r"\w-$", line)] == []  # names such as imm-merge stay whole
    assert ended.out.isascii()


@pytest.mark.parametrize("which", PROGRAMS, ids=named)
def test_every_option_stands_once_under_its_heading(which: click.Command, command: Command) -> None:
    found = sections(command(which, "--help").out)
    shown = [heading for heading in found if heading != "Usage"]
    assert shown == [heading for heading in HEADINGS if heading in found]
    assert "--help" in found["Running"]
    for param in which.params:
        for name in (each for each in param.opts if each.startswith("--")):
            under = [heading for heading in shown if re.search(rf"^  (-\w, )?{name}\b(?!-)", found[heading], re.M)]
            assert under == [getattr(param, "heading", None)], name


@pytest.mark.parametrize(
    ("which", "usage"),
    [
        (merge_command, "imm-merge [OPTIONS] BASE SFT -o OUT"),
        (verify_command, "imm-verify [OPTIONS] OUT"),
        (loop_command, "imm-loop [OPTIONS] BASE --train COMMAND -o RUN"),
        (analyze_command.commands["importance"], "importance [OPTIONS] MODEL --data FILE -o FILE"),
        (analyze_command.commands["kl"], "kl [OPTIONS] BASE MODEL... --data FILE"),
        (analyze_command.commands["pareto"], "pareto [OPTIONS] RESULT... --in METRIC --out METRIC"),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_the_usage_shows_what_is_required(which: click.Command, usage: str, command: Command) -> None:
    assert command(which, "--help").out.splitlines()[0] == f"Usage: {usage}"


def test_the_options_of_a_merge_are_grouped(command: Command) -> None:
    found = sections(command(merge_command, "--help").out)
    assert list(found) == ["Inputs", "Merge", "Output", "Running"]
    for heading, name in {
        "Inputs": "--start",
        "Merge": "--alpha",
        "Output": "-o, --out",
        "Running": "--workers",
    }.items():
        assert f"\n  {name} " in f"\n{found[heading]}"
    assert "[default: 0]" in found["Merge"]  # a seed of 0 is not the absence of one


def test_columns_follow_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = {}
    for width in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        texts = sections(command(merge_command, "--help").out)
        at = {line.index("Hide") for line in texts["Running"].splitlines() if "Hide" in line}
        at |= {line.index("Model that SFT") for line in texts["Inputs"].splitlines() if "Model that SFT" in line}
        (starts[width],) = at  # the same in every group
    assert starts[60] < starts[80] <= starts[120]


def test_the_module_without_arguments_shows_its_commands() -> None:
    alone, asked = subprocess_of(), subprocess_of("--help")
    assert (alone.status, alone.out) == (2, "")
    assert (asked.status, asked.err) == (0, "")
    assert alone.err == asked.out
    listed = re.findall(r"^  (\w+)  +\w", sections(asked.out)["Commands"], re.MULTILINE)
    assert listed == list(COMMANDS)


def test_what_is_no_command_is_named() -> None:
    ended = subprocess_of("mrege")
    assert (ended.status, ended.out) == (2, "")
    assert (
        ended.error
        == "No such command 'mrege'; give one of merge, verify, loop, analyze; see python -m mergekit_imm --help"
    )


@pytest.mark.parametrize("name", ["merge", "verify", "loop", "analyze"])
def test_every_command_of_the_module_is_the_program(name: str) -> None:
    ended = subprocess_of(name, "--version")
    assert (ended.status, ended.out, ended.err) == (0, f"imm-{name}, version {mergekit_imm.__version__}\n", "")
