"""Worker threads that nobody waits for any more: what they use is closed when they have ended, and no earlier.

The number of a closed descriptor goes to the next file that is opened, and a late write would land there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

_abandoned: set[threading.Event] = set()
_later: list[Callable[[], object]] = []
_lock = threading.Lock()


def abandon(ends: Collection[threading.Event]) -> None:
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
