"""The exceptions of this library, and how their messages address the caller.

    MergeError
    ├── ArgumentError      invalid value of a parameter (also a ValueError)
    ├── CheckpointError    an input cannot be found, read or understood
    │   └── ChangedError   an input changed during the merge
    ├── ExtraError         a package from an extra is not installed (also an ImportError)
    ├── MismatchError      the inputs do not belong together (also a ValueError)
    ├── NonFiniteError     NaN, infinity, or a value too large for the output dtype
    ├── OutputError        the output cannot or must not be written
    ├── PlanError          the plan loses a tensor: a bug of this library, found before a byte is written
    ├── PartialMergeError  a merge into a live model failed midway: the model is unusable
    ├── RankError          another rank of the merge has ended
    └── VerifyError        an output does not match its recipe

Each message is one line: what was asked, what was found, where, and the cure. Messages are written with the options of
commands (`--take '^x$'`); Python callers see parameters instead (`take=[r"^x$"]`).
"""

from __future__ import annotations

from .common.messages import for_caller


class MergeError(Exception):
    """Base class of all errors that this library raises deliberately."""

    def __str__(self) -> str:
        """Return the message for this caller, with options or parameters; `args` holds it with options."""
        return for_caller(super().__str__())


class ArgumentError(MergeError, ValueError):
    """A parameter has an invalid value."""


class CheckpointError(MergeError):
    """An input cannot be found, read or understood."""


class ChangedError(CheckpointError):
    """An input changed during the merge."""


class ExtraError(MergeError, ImportError):
    """A package that not everything needs is not installed."""


class MismatchError(MergeError, ValueError):
    """The inputs do not belong together: names, shapes, kinds of dtype, or architectures differ."""


class NonFiniteError(MergeError):
    """An input holds NaN or infinity, or a merged value is too large for the output dtype."""


class OutputError(MergeError):
    """The output cannot or must not be written."""


class PlanError(MergeError):
    """The plan does not account for every tensor: a bug of this library, found before a byte is written."""


class PartialMergeError(MergeError):
    """A merge into a live model failed after some tensors were merged: load the model again."""


class RankError(MergeError):
    """Another rank of the merge has ended."""


class VerifyError(MergeError):
    """An output does not match its recipe."""


def install(package: str) -> str:
    """Return the command that installs a package in a version that this library works with.

    It names the package, not an extra of this library, so that it works wherever the library came from: an index, a
    clone or a wheel.

    >>> install("a-package-that-is-not-named")
    'pip install a-package-that-is-not-named'
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        named = [each.partition(";")[0].strip() for each in requires("mergekit-imm") or ()]
    except PackageNotFoundError:
        named = []
    found = next(
        (each for each in named if each.startswith(package) and each[len(package) :][:1] in ("<", ">", "=")), ""
    )
    return f"pip install '{found}'" if found else f"pip install {package}"


def extra_error(what: str, package: str) -> ExtraError:
    """Return the error for a feature that needs a missing package."""
    return ExtraError(f"{what} needs {package}, which is not installed; {install(package)}")
