"""Compare mathematical expressions by value, with math-verify in a process of its own.

math-verify bounds its time with signals, which work in the main thread only, and a computation in C does not notice
them. In a process of its own the kernel ends what takes too long, whichever thread asks.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import IO

from ..common.messages import shown
from ..errors import MergeError, extra_error

WORKER = Path(__file__).with_name("value_worker.py")


class TooLongError(Exception):
    """A comparison took too long, or too much memory."""


def check_installed() -> None:
    """Raise ExtraError unless math-verify is installed; even numbers, so that all installations judge alike."""
    if sys.modules.get("math_verify", sys) is None or not _is_found():
        raise extra_error("Judging answers", "math-verify")


@lru_cache(maxsize=1)
def _is_found() -> bool:
    return importlib.util.find_spec("math_verify") is not None


LONGEST, DEEPEST = 300, 8  # characters of an expression, and its brackets within brackets
# Towers of powers, powers, factorials and binomials with millions of digits: refused at once rather than after seconds.
_EXPENSIVE = re.compile(
    r"\^\s*\{?\s*\d+\s*\^|\^\s*\{?\s*-?\d{5,}|[\])}]\s*\^\s*\{?\d{3,}|\d{100,}"
    r"|\d{4,}[\s})]*!|![\s\])}]*!|\\d?binom\s*\{?\d{5,}|\\d?binom\{\d+\}\{?\d{5,}"
)


@lru_cache(maxsize=1 << 16)
def same_value(one: str, other: str) -> bool:
    r"""Return whether two TeX expressions have the same value.

    What math-verify cannot read is different from everything, and so are expressions of more than 300 characters, with
    unbalanced or deeply nested brackets, and with numbers of thousands of digits. Raises TooLongError for what takes
    more than three seconds of processor time or 4 GiB, MergeError if its process cannot start.

    >>> same_value(r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"), same_value("x+1", "x-1")
    (True, False)
    """
    if any(len(each) > LONGEST or _EXPENSIVE.search(each) or not _is_nested_well(each) for each in (one, other)):
        return False
    return _worker.ask(*sorted((one, other)))


def _is_nested_well(text: str) -> bool:
    """Whether brackets are balanced, `[0, 1)` included, and at most `DEEPEST` deep."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
        if depth < 0:
            return False
    return depth == 0 and deepest <= DEEPEST and text.count("|") <= DEEPEST


class _Worker:
    """The process, started when it is first needed; one question at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, one: str, other: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.end()
                self.process = _started()
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            try:
                self.process.stdin.write(json.dumps([one, other]) + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BaseException:  # Ctrl-C: the answer to this question must not become that to the next
                self.end()
                raise
            if not answer:
                self.end()
                raise TooLongError(f"{shown(one, 60)} and {shown(other, 60)} take too long to compare")
            return answer == "same\n"

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _started() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            process_group=0,  # Ctrl-C is for this process alone
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.communicate()
            raise MergeError(
                f"math-verify cannot be started: {_last_line(errors)}; see that `import math_verify` works"
            )
    return process


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    return shown((errors.read().strip().splitlines() or ["no message"])[-1], 200)


_worker = _Worker()
_of_parents: list[_Worker] = []  # kept, so that nothing ends the process of another


def _after_fork() -> None:
    global _worker
    _of_parents.append(_worker)
    _worker = _Worker()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _worker.end())
