"""A loop in progress: its folder, its state, which steps are done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .commands import Echo
from .state import State, anchor_decay, save, with_steps

Tell = Callable[[str], None]


class Loop:
    """A loop in progress: its folder, its state, and its output callbacks."""

    def __init__(self, folder: Path, held: int | None, state: State, echo: Echo | None, tell: Tell | None) -> None:
        self.folder, self.held, self.state, self.echo = folder, held, state, echo
        self.tell: Tell = tell or (lambda _: None)
        self.settings = state.settings

    def has(self, step: str) -> bool:
        """Whether a step is done."""
        return step in self.state.done

    def finish(self, *steps: str, **changes: Any) -> None:
        """Record on disk that steps are done."""
        self.state = with_steps(self.state, steps, **changes)
        save(self.state, self.folder)

    def place(self, number: int, name: str = "", chain: str = "") -> Path:
        """Return the folder of a round, or a path in it."""
        folder = self.folder / chain / f"round-{number}"
        return folder / name if name else folder

    def start(self, number: int) -> str:
        """Return the model that a round starts from."""
        return str(self.place(number - 1, "merged")) if number else self.settings.base

    def anchor(self, number: int) -> str:
        """Return the model that a round is pulled back to."""
        kept = anchor_decay(self.settings.anchor)
        if kept == 1 or number == 0:
            return self.settings.base
        return self.start(number) if kept == 0 else str(self.place(number, "anchor"))
