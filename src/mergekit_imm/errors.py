"""Everything this library raises on purpose, and how its messages speak to whoever called.

    MergeError
    ├── ArgumentError      a parameter has a value it cannot have (also a ValueError)
    ├── CheckpointError    an input cannot be found, read or understood
    │   └── ChangedError   an input was changed while it was merged
    ├── ExtraError         a package is missing that an extra installs (also an ImportError)
    ├── MismatchError      inputs that do not belong together (also a ValueError)
    ├── NonFiniteError     NaN, infinity, or a value too large for the output dtype
    ├── OutputError        the output cannot be written, or must not be
    ├── PlanError          a plan that loses something: an error of this program, found before a byte is written
    ├── PartialMergeError  a merge into a live model failed on the way: the model is of no use
    ├── RankError          of the ranks of one merge, another has ended
    └── VerifyError        an output is not what its recipe says

Each message is one line: what was asked, what was found, where, and the cure. Messages are written with options, as
commands take them (`--take '^x$'`), and read so by a command's user; in Python they name parameters (`take=[r"^x$"]`).
"""

from __future__ import annotations

from .common.messages import for_caller


class MergeError(Exception):
    """Base class of every error that this library raises on purpose."""

    def __str__(self) -> str:
        """Return the message as whoever called reads it; `args` holds it as it was written."""
        return for_caller(super().__str__())


class ArgumentError(MergeError, ValueError):
    """A parameter has a value it cannot have."""


class CheckpointError(MergeError):
    """An input cannot be found, read or understood."""


class ChangedError(CheckpointError):
    """An input was changed while it was merged."""


class ExtraError(MergeError, ImportError):
    """A package is missing that an extra of this one installs."""


class MismatchError(MergeError, ValueError):
    """Inputs do not belong together: names, shapes, kinds of dtype, architectures."""


class NonFiniteError(MergeError):
    """An input holds NaN or infinity, or a merged value is too large for the output dtype."""


class OutputError(MergeError):
    """The output cannot be written, or must not be."""


class PlanError(MergeError):
    """A plan does not account for every tensor: an error of this program, found before a byte is written."""


class PartialMergeError(MergeError):
    """A merge into a live model failed when parts of it were written: load the model again."""


class RankError(MergeError):
    """Of the ranks of one merge, another has ended."""


class VerifyError(MergeError):
    """An output is not what its recipe says."""


def extra_error(what: str, package: str, extra: str) -> ExtraError:
    """Return the error for something that needs a package which is not there."""
    return ExtraError(f"{what} needs {package}, which is not installed; pip install 'mergekit-imm[{extra}]'")
