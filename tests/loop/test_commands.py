"""The user's commands and imm-loop itself: signals, kills, background processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import HUNG
from loops import EVALUATE, TRAIN, asked
from mergekit_imm import ArgumentError, OutputError
from mergekit_imm.loop.commands import filled, run_command
from mergekit_imm.loop.run import run_loop
from mergekit_imm.loop.state import load
from thorough import others


@given(value=st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1))
@settings(max_examples=60, deadline=None)
def test_any_value_reaches_a_command_as_one_word(value: str) -> None:
    command = filled("printf '<%s>' {model} '{x: 1}' {other}", {"model": value})
    said = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True).stdout
    assert said.decode() == f"<{value}><{{x: 1}}><{{other}}>"


def test_placeholders_inside_quotes_are_filled_or_refused() -> None:
    assert filled("run '{model}'", {"model": "plain"}) == "run 'plain'"
    assert filled("run ${model} $x{model}", {"model": "m"}) == "run ${model} $xm"  # the first is a shell variable
    for template in ("run '{model}'", 'run "--m={model}"'):
        with pytest.raises(ArgumentError, match="leave out the quotes around it"):
            filled(template, {"model": "a b"})
    assert filled("run \\'{model} \"'\" {model}", {"model": "a b"}) == "run \\''a b' \"'\" 'a b'"


def test_commands_have_the_environment_and_no_input(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_USER", "here")
    heard: list[bytes] = []
    run_loop(asked(base, rounds=1, train=f"echo $OF_THE_USER; cat; {TRAIN}"), "run", echo=heard.append)
    assert b"here\ntrained round 0\n" in b"".join(heard)


def test_what_a_command_leaves_running_is_not_waited_for_but_holds_the_folder(base: str) -> None:
    wanted = asked(base, rounds=1, train=f"sleep 900 & echo $! > pid; {TRAIN}")
    run_loop(wanted, "run")
    os.kill(int(Path("pid").read_text()), 0)  # it runs
    with pytest.raises(OutputError, match="run/lock is in use"):
        run_loop(wanted, "run")
    os.kill(int(Path("pid").read_text()), signal.SIGKILL)
    while True:
        try:
            run_loop(wanted, "run")
            break
        except OutputError:
            time.sleep(0.05)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_filesystem_without_locks(base: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lines: list[str] = []
    run_loop(asked(base, rounds=1), "run", tell=lines.append)
    assert lines[0] == "note: the filesystem of run has no locks: make sure that no other loop runs there"


# --- the command itself


def imm_loop(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mergekit_imm", "loop", *arguments]


def test_the_command_tells_its_steps_and_ends_with_the_table(base: str) -> None:
    arguments = imm_loop("base", "-o", "run", "--rounds", "2", "--train", TRAIN, "--evaluate", EVALUATE)
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("trained round 0\ntrained round 1\nmodel    alpha  distance  nested.left\nbase")
    assert done.stdout.endswith("pictures: run/metrics.png, run/metrics.svg\nthe last model is run/round-1/merged\n")
    assert "round 1: merge: alpha 0.5, drop 0.2, anchor base\n" in done.stderr
    quiet = subprocess.run([*arguments, "--json", "-q"], capture_output=True, text=True, check=True)
    assert json.loads(quiet.stdout)["model"] == "run/round-1/merged"
    assert quiet.stderr == ""


def test_the_command_ends_with_the_status_of_the_user_s(base: str) -> None:
    arguments = imm_loop("base", "-o", "run", "--train", "echo oh; exit 42 # {output}")
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 42
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the train command of round 0 ended with status 42; its last line: oh")
    quiet = subprocess.run([*arguments, "-q"], capture_output=True, text=True, check=False)
    assert (quiet.returncode, quiet.stderr.splitlines()[:-1], quiet.stdout) == (42, ["oh"], "")


def test_refused_before_anything_is_run(base: str) -> None:
    done = subprocess.run(
        imm_loop("nowhere", "-o", "run", "--train", "touch ran {output}"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, Path("ran").exists()) == (1, False)


def until(what: Callable[[], bool]) -> None:
    while not what():
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_too(base: str, number: signal.Signals, status: int) -> None:
    train = "trap 'echo asked >> asked; exit 1' INT TERM; echo $$ > pid; while :; do sleep 0.1; done # {output}"
    loop = subprocess.Popen(
        imm_loop("base", "-o", "run", "--train", train),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a background job may ignore it
    )
    until(lambda: Path("pid").exists() and Path("pid").read_text().strip() != "")
    loop.send_signal(number)
    _, output = loop.communicate(timeout=HUNG)
    assert loop.returncode == status
    assert "run the same command again to resume" in output
    assert Path("asked").read_text() == "asked\n"
    assert not Path(f"/proc/{int(Path('pid').read_text())}").exists()


def test_a_second_signal_leaves_the_command_its_time_to_end(base: str) -> None:
    """It may write a checkpoint; only then the loop ends, at once."""
    train = (
        "trap 'touch asked; sleep 1; touch saved; exit 1' INT; echo $$ > pid; while :; do sleep 0.1; done # {output}"
    )
    loop = subprocess.Popen(
        imm_loop("base", "-o", "run", "--train", train),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(lambda: Path("pid").exists() and Path("pid").read_text().strip() != "")
    loop.send_signal(signal.SIGINT)
    until(Path("asked").exists)
    loop.send_signal(signal.SIGINT)
    _, told = loop.communicate(timeout=HUNG)
    assert loop.returncode == 130
    assert told.splitlines()[-1].startswith("error: interrupted twice; ")
    assert Path("saved").exists()
    assert not Path(f"/proc/{int(Path('pid').read_text())}").exists()


def test_a_signal_that_comes_while_a_command_is_started_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[bytes]] = []

    class Begun(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            begun.append(self)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(subprocess, "Popen", Begun)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_command("train", "sleep 900", tmp_path / "log", held=None, echo=None, cure="")
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun[0].returncode is not None


@pytest.mark.parametrize("kills", [2, *others(8)])
def test_killed_anywhere_the_same_command_goes_on_to_the_same_models(base: str, kills: int) -> None:
    arguments = imm_loop("base", "-o", "run", "--rounds", "2", "--train", TRAIN, "--evaluate", EVALUATE, "-q")
    subprocess.run([*arguments[:6], "whole", *arguments[7:]], check=True, capture_output=True)
    for number in range(kills):
        loop = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.3 + 2.8 * number / kills)
        loop.kill()
        loop.wait()
    until(lambda: subprocess.run(arguments, capture_output=True, check=False).returncode == 0)
    one, other = load(Path("run")), load(Path("whole"))
    assert one is not None
    assert other is not None
    assert one.metrics == other.metrics
    for path in Path("whole").rglob("*.safetensors"):
        assert (Path("run") / path.relative_to("whole")).read_bytes() == path.read_bytes()
