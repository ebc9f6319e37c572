"""A merge in Python that is interrupted twice, as its worker hangs in a read: nothing lands in another file."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from checkpoints import files_of, random_state, write_model
from mergekit_imm import OutputError, merge_checkpoints

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux")
SHAPES = {f"model.layers.{i}.w": (256, 1024) for i in range(4)}
MAIN = threading.main_thread()


def until(what: Callable[[], object]) -> None:
    while not what():
        time.sleep(0.01)


def main_waits_for_workers() -> bool:
    frame = sys._current_frames()[MAIN.ident or 0]
    while frame.f_back is not None and frame.f_code is not threading.Thread.join.__code__:
        frame = frame.f_back
    return frame.f_code is threading.Thread.join.__code__


def open_files() -> list[str]:
    return [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]


def test_a_second_interrupt_closes_nothing_that_a_hung_worker_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sft = (write_model(tmp_path / f"in{i}", random_state(SHAPES, seed=i)) for i in range(2))
    out, partial = tmp_path / "out", str(tmp_path / "out.partial")
    merge_checkpoints(base, sft, tmp_path / "whole")
    hangs, goes_on, preadv = threading.Event(), threading.Event(), os.preadv

    def hanging(*arguments: Any) -> int:
        done = preadv(*arguments)
        if threading.current_thread() is not MAIN and interrupter.is_alive():
            hangs.set()
            goes_on.wait()
        return done

    def interrupt() -> None:
        for ready in (hangs.is_set, main_waits_for_workers):
            until(ready)
            signal.pthread_kill(MAIN.ident or 0, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    monkeypatch.setattr(os, "preadv", hanging)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupter.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(base, sft, out, workers=1)
    finally:
        signal.signal(signal.SIGINT, handler)
        interrupter.join()
    with ExitStack() as stack:
        stack.callback(goes_on.set)
        others = [stack.enter_context((tmp_path / f"other{i}").open("wb")) for i in range(40)]  # next descriptors
        with pytest.raises(OutputError, match="being written by another merge"):
            merge_checkpoints(base, sft, out, restart=True)
        goes_on.set()
        until(lambda: not any(thread.name.startswith("merge-") for thread in threading.enumerate()))
    assert {Path(each.name).stat().st_size for each in others} == {0}
    assert not [name for name in open_files() if name.startswith((partial, str(base), str(sft)))]
    assert merge_checkpoints(base, sft, out).status == "merged"
    assert files_of(out) == files_of(tmp_path / "whole")
