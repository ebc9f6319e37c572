"""math-verify in a process of its own: right, bounded, in any thread and after a fork, and started again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from mergekit_imm import ExtraError, MergeError
from mergekit_imm.evaluation import by_value, is_correct, same_answer
from mergekit_imm.synthesis import Sample, consensus, crescent, keep_correct

SAME = [
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{x}{2}", r"\frac12 x"),
    (r"\binom{6}{2}", "15"),
    (r"0.25\pi", r"\frac{\pi}{4}"),
    (r"(1, \sqrt{4})", "(1,2)"),
    (r"3 \pm \sqrt2", r"3-\sqrt{2}, 3+\sqrt{2}"),
]
OTHERS = [
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    ("3.14", r"\pi"),
    ("0.6667", r"\frac{2}{3}"),
    (r"0.3333333333\pi", r"\frac{\pi}{3}"),
    ("x", "X"),
    ("x+1", "y+1"),
    ("x + y = 12", "12"),
    ("x = 5", "y = 5"),
    ("5ab", "5"),
    ("[0, 5)", "[0, 5]"),
]
HOSTILE = [
    "9^{9^{9^{9}}}",
    "9^{999999999}",
    "(9^{9999})^{9999}",
    "100000000!",
    "((9!)!)!",
    r"\binom{1000000000}{500000000}",
    "(" * 500 + "1" + ")" * 500,
    r"\sqrt{" * 100 + "2" + "}" * 100,
    "(a+b+c+d+e+f)^{900}",
    r"\prod_{i=1}^{10000000} i",
    "1,".join(["x^2"] * 200),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_same_values(one: str, other: str) -> None:
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_other_values(one: str, other: str) -> None:
    assert not same_answer(one, other)
    assert not same_answer(other, one)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_expressions_end(text: str) -> None:
    """Each would take hours, or all memory."""
    assert not is_correct(f"\\boxed{{{text}}}", "(a+b)^2")
    assert same_answer("x+1", "1+x")


def test_any_thread_may_ask() -> None:
    found: list[bool] = []
    threads = [threading.Thread(target=lambda i=i: found.append(same_answer(f"x+{i}", f"{i}+x"))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def _judged(number: int) -> bool:
    return same_answer(f"y+{number}", f"{number}+y") and not same_answer(f"y+{number}", f"{number}+z")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_forked_from_this_one_may_ask() -> None:
    assert same_answer("z+1", "1+z")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_judged, range(6)) == [True] * 6
    assert same_answer("z+2", "2+z")


def test_a_process_that_is_killed_is_started_again() -> None:
    assert same_answer("v+1", "1+v")
    process = by_value._worker.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert same_answer("v+2", "2+v")


def test_one_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import a_module_that_is_not_there")
    monkeypatch.setattr(by_value, "WORKER", worker)
    monkeypatch.setattr(by_value, "_worker", by_value._Worker())
    with pytest.raises(MergeError, match=r"^math-verify cannot be started: ModuleNotFoundError: .*a_module"):
        same_answer("u+1", "1+u")


def test_without_it_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is called, and for numbers too: no installation judges otherwise than another."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for call in (
        lambda: is_correct("5", "5"),
        lambda: same_answer("5", "5"),
        lambda: consensus(["5"]),
        lambda: keep_correct([Sample("p", "5", "5")]),
        lambda: crescent(pytest.fail, pytest.fail, pytest.fail, questions=1, samples=2),  # type: ignore[arg-type]
    ):
        with pytest.raises(ExtraError, match=r"pip install 'math-verify>=0.8'"):
            call()
    assert consensus(["5", "5"], same=str.__eq__).answer == "5"
    assert keep_correct([Sample("p", "5", "5")], matcher=str.__eq__).samples
