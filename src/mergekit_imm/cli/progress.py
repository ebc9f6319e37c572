"""How far a command is: a bar on a terminal, and lines elsewhere, as in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

from ..common.progress import Progress, terminal_bar, written
from .console import tell

SILENT = 30.0  # seconds between two lines


@contextmanager
def progress_bar(
    label: str, *, shown: bool, rate: Callable[[float], str] = written
) -> Iterator[Progress | Literal[False]]:
    """Yield a function that shows steps done, `rate` of the steps in a second and the time left, or False.

    On a terminal it draws a bar. Elsewhere, as in a log, it prints lines: one for a tenth of the whole, but none in
    the first SILENT seconds, nor sooner than that after the last.
    """
    on_terminal = sys.stderr.isatty()
    if not shown or not on_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of downloads
    if not shown:
        yield False
    elif on_terminal:
        with terminal_bar(label, rate) as update:
            yield update
    else:
        yield _lines(label, rate)


def _lines(label: str, rate: Callable[[float], str]) -> Progress:
    first, tenths = -1, 0
    began = last = 0.0

    def update(done: int, total: int) -> None:
        nonlocal first, tenths, began, last
        now = time.perf_counter()
        if first < 0:
            first, tenths, began, last = done, 10 * done // max(total, 1), now, now
        if 10 * done // max(total, 1) == tenths or now - last < SILENT or done >= total:
            return
        tenths, last = 10 * done // total, now
        per_second = (done - first) / (now - began)
        left = timedelta(seconds=round((total - done) / per_second))
        tell(f"{label}: {100 * done // total} %, {rate(per_second)}, {left} left")

    return update


class LogLines:
    """Output of commands as whole lines, for a log.

    Of a line that overwrites itself by carriage returns, as bars do, it writes the last state, and until then one
    every SILENT seconds.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write, self._rest, self._last = write, b"", time.perf_counter()

    def __call__(self, piece: bytes) -> None:
        """Take the next bytes of the output."""
        *lines, rest = (self._rest + piece).split(b"\n")
        self._write(b"".join(_state(line) + b"\n" for line in lines))
        if b"\r" in rest:
            rest = _state(rest) + (b"\r" if rest.endswith(b"\r") else b"")
            if time.perf_counter() - self._last >= SILENT:
                self._last = time.perf_counter()
                self._write(_state(rest) + b"\n")
        self._rest = rest

    def flush(self) -> None:
        """Write what has no end of line yet, as a line."""
        if self._rest:
            self._write(_state(self._rest) + b"\n")
        self._rest = b""


def _state(line: bytes) -> bytes:
    """Return what was written last into a line."""
    return next((each for each in reversed(line.split(b"\r")) if each.strip()), b"")
