"""Worker threads that nobody waits for any more: what they use is closed when they have ended, and no earlier.

The number of a closed descriptor goes to the next file that is opened, and a late write would land there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

_abandoned: set[threading.Thread] = set()
_later: list[Callable[[], object]] = []
_lock = threading.Lock()


def abandon(threads: Sequence[threading.Thread]) -> None:
    """Stop waiting for threads; one of their own does, and then calls what `when_unused` was given meanwhile."""
    alive = [thread for thread in threads if thread.is_alive()]
    with _lock:
        _abandoned.update(alive)
    threading.Thread(target=_wait, args=(alive,), name="merge-wait", daemon=True).start()


def _wait(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
    with _lock:
        _abandoned.difference_update(threads)
        while _later and not _abandoned:
            _later.pop()()


def when_unused(close: Callable[[], object]) -> None:
    """Call this now, or when all abandoned threads have ended."""
    with _lock:
        if _abandoned:
            _later.append(close)
            return
    close()
