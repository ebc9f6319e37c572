"""Progress of long work, shown where a person watches: a terminal, or a notebook.

Nothing is shown in pipes, logs, under pytest or where CI is set: there a bar is only noise.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from html import escape
from typing import Any, Literal

from .checks import check_callable

Progress = Callable[[int, int], None]  # done, in all
Watched = Progress | Literal[False] | None  # a function to call, nothing, or a bar where a person watches

PATIENCE, PAUSE = 0.5, 0.2  # seconds before a notebook shows a bar, and between its changes
_UNWATCHED = ("CI", "PYTEST_CURRENT_TEST")


def written(per_second: float) -> str:
    """Return a rate of bytes written."""
    return f"{per_second / 1e9:.2f} GB/s written"


def check_progress(given: Any) -> Progress | None:
    """Return the function to call, None for False and None. Raises ArgumentError for anything else."""
    if given is None or given is False:
        return None
    check_callable("progress", given, "of (done, in all), False for silence, or None for a bar where a person watches")
    function: Progress = given
    return function


@contextmanager
def watched(
    given: Watched, label: str, *, rate: Callable[[float], str] = written, here: bool = True
) -> Iterator[Progress | None]:
    """Yield the function to call with (done, in all): the caller's, one that draws a bar if a person watches, or None.

    `rate` words the steps in a second. With `here` False (ranks but the first) there is no bar. The bar goes when the
    work ends, in a notebook, or is closed, in a terminal, whatever ends it. Raises ArgumentError.
    """
    function = check_progress(given)
    if function is not None:
        yield function
    elif given is False or not here or any(map(os.environ.get, _UNWATCHED)):
        yield None
    else:
        bar: AbstractContextManager[Progress] | None = None
        if _is_notebook():
            bar = notebook_bar(label, rate)
        elif sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            bar = terminal_bar(label, rate)
        if bar is None:
            yield None
        else:
            with bar as update:
                yield update


def _is_notebook() -> bool:
    """Whether this process is the kernel of a notebook, without importing IPython."""
    interactive = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(interactive, "kernel", None) is not None


@contextmanager
def terminal_bar(label: str, rate: Callable[[float], str] = written) -> Iterator[Progress]:
    """Yield a function that draws a bar on standard error, with the time left and the rate."""
    import click

    bar: Any = None
    first, began = 0, 0.0

    def update(done: int, total: int) -> None:
        nonlocal bar, first, began
        if bar is None:
            first, began = done, time.perf_counter()
            bar = click.progressbar(
                length=total,
                label=label,
                file=sys.stderr,
                show_eta=True,
                width=30,
                item_show_func=lambda item: item,
                update_min_steps=max(1, total // 500),
            )
            bar.__enter__()
        elapsed = time.perf_counter() - began
        bar.update(max(0, done - bar.pos), rate((done - first) / max(elapsed, 1e-9)))

    try:
        yield update
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


@contextmanager
def notebook_bar(label: str, rate: Callable[[float], str] = written) -> Iterator[Progress]:
    """Yield a function that draws a bar below the cell of a notebook, once the work lasts; it goes when this ends."""
    from IPython.display import HTML, display  # type: ignore[import-not-found, unused-ignore]

    handle: Any = None
    began = drawn = time.perf_counter()
    first: int | None = None

    def update(done: int, total: int) -> None:
        nonlocal handle, drawn, first
        now = time.perf_counter()
        first = done if first is None else first
        if now - began < PATIENCE or (handle is not None and now - drawn < PAUSE):
            return
        drawn, speed = now, (done - first) / (now - began)
        left = f", {(total - done) / speed:.0f} s left" if speed > 0 else ""
        bar = HTML(
            f'<div>{escape(label)} <progress value="{done}" max="{max(1, total)}"></progress>'
            f" {100 * done / max(1, total):.0f} %{left}, {escape(rate(speed))}</div>"
        )
        if handle is None:
            handle = display(bar, display_id=True)
        else:
            handle.update(bar)

    try:
        yield update
    finally:
        if handle is not None:
            handle.update(HTML(""))
