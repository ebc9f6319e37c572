"""Run tasks on threads: results as they finish, the first failure raised, and workers that hang left behind.

What threads use is closed by `when_unused`. The number of a closed descriptor goes to the next file that is opened,
and a late write of a worker that nobody waits for would land there.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Collection, Generator, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Return min(4, 2 x CPUs available): one worker computes while another waits for the disk."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, min(4, 2 * cpus))


def in_threads(
    todo: Iterable[T], worker: Callable[[], Callable[[T], R]], workers: int, stop: threading.Event | None = None
) -> Generator[R | None, None, None]:
    """Process tasks on threads; yield each result as it comes, and None after 0.1 s without one.

    `worker` makes each thread's function. Tasks start in order. Once those in progress have ended, the failure of the
    first task in that order is raised: the same one for any number of workers. `stop` is set when they must end; a
    `todo` that blocks must check it. Closing the iterator stops the workers.

    It waits for the workers, however it ends. A second interrupt during that wait abandons them, so close what they use
    by `when_unused`.
    """
    source = enumerate(todo)
    turn = threading.Lock()
    stop = stop or threading.Event()
    results: queue.SimpleQueue[tuple[int, R | None, BaseException | None] | None] = queue.SimpleQueue()

    ends: list[threading.Event] = []

    def work() -> None:
        ends.append(end := threading.Event())
        index = -1
        try:
            process = worker()
            while not stop.is_set():
                with turn:
                    index, task = next(source, (index, None))
                if task is None:
                    break
                results.put((index, process(task), None))
        except BaseException as error:
            stop.set()
            results.put((index, None, error))
        end.set()
        results.put(None)

    threads: list[threading.Thread] = []
    failures: list[tuple[int, BaseException]] = []
    try:
        for i in range(workers):
            thread = threading.Thread(target=work, name=f"merge-{i}", daemon=True)
            threads.append(thread)
            thread.start()
        running = workers
        while running:
            try:
                result = results.get(timeout=0.1)
            except queue.Empty:
                yield None
                continue
            if result is None:
                running -= 1
            elif result[2] is not None:
                failures.append((result[0], result[2]))
            else:
                yield result[1]
    finally:
        try:
            stop.set()
            for thread in threads:
                if thread.is_alive():
                    thread.join()
        except BaseException:  # interrupted while it waits: a worker may hang in a read
            _abandon(tuple(ends))
            raise
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]


_abandoned: set[threading.Event] = set()
_later: list[Callable[[], object]] = []
_lock = threading.Lock()


def _abandon(ends: Collection[threading.Event]) -> None:
    """Stop waiting for workers, each of which sets an event when it ends; then what `when_unused` was given is called.

    Not the threads themselves: one whose `join` was interrupted may say that it has ended when it has not.
    """
    with _lock:
        _abandoned.update(ends)
    threading.Thread(target=_wait, args=(ends,), name="merge-wait", daemon=True).start()


def _wait(ends: Collection[threading.Event]) -> None:
    for end in ends:
        end.wait()
    with _lock:
        _abandoned.difference_update(ends)
        while _later and not _abandoned:
            _later.pop()()


def when_unused(close: Callable[[], object]) -> None:
    """Call this now, or when all abandoned workers have ended."""
    with _lock:
        if _abandoned:
            _later.append(close)
            return
    close()
