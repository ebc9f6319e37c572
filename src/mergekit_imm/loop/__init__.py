"""Rounds of training and merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rounds import Rounds as Rounds
    from .run import run_loop as run_loop
    from .state import Settings as Settings
    from .state import State as State
    from .trainer_callback import IMMCallback as IMMCallback
else:
    from ..common.lazy import lazy

    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            ".rounds": "Rounds",
            ".run": "run_loop",
            ".state": "Settings State",
        },
        {
            ".trainer_callback": "IMMCallback",
        },
    )
