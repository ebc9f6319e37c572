"""Everything this library raises on purpose.

    MergeError
    ├── ArgumentError      a parameter has a value it cannot have (also a ValueError)
    ├── CheckpointError    an input cannot be found, read or understood
    │   └── ChangedError   an input was changed while it was merged
    ├── MismatchError      inputs that do not belong together (also a ValueError)
    ├── NonFiniteError     NaN, infinity, or a value too large for the output dtype
    ├── OutputError        the output cannot be written, or must not be
    ├── PlanError          a plan that loses something: an error of this program, found before a byte is written
    ├── PartialMergeError  a merge into a live model failed on the way: the model is of no use
    ├── RankError          of the ranks of one merge, another has ended
    └── VerifyError        an output is not what its recipe says

Each message is one line: what was asked, what was found, where, and the cure.
"""


class MergeError(Exception):
    """Base class of every error that this library raises on purpose."""


class ArgumentError(MergeError, ValueError):
    """A parameter has a value it cannot have."""


class CheckpointError(MergeError):
    """An input cannot be found, read or understood."""


class ChangedError(CheckpointError):
    """An input was changed while it was merged."""


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


def bytes_text(count: int) -> str:
    """Return a number of bytes as it may stand in a message.

    >>> bytes_text(3_090_000_000), bytes_text(512)
    ('3.09 GB', '512 bytes')
    """
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} bytes"


def shown(name: object, limit: int = 120) -> str:
    """Return a name from a file as it may stand in a message: escaped, and cut when long.

    >>> shown("a\\nb")
    'a\\\\nb'
    """
    text = str(name).encode("unicode_escape", "surrogatepass").decode("ascii")
    return text if len(text) <= limit else text[: limit - 1] + "…"
