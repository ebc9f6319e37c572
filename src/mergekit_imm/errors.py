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

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

_LISTS = ("keep", "leave-out", "no-drop", "rename", "take")
_FLAGS = ("allow-nonfinite", "copy-code", "dequantize", "dry-run", "overwrite", "restart", "verify")
_OTHERS = (
    "alpha", "base", "batch-size", "clip", "device", "drop", "dtype", "encoder", "importance", "iteration",
    "layer-factors", "max-length", "max-shard-size", "reference", "sample", "seed", "sft", "shrink", "sparsify",
    "start", "vocab", "workers",
)  # fmt: skip
_OPTION = re.compile(
    rf"""(?<![\w-])--(?P<option>{"|".join((*_LISTS, *_FLAGS, *_OTHERS))})(?![\w-])
    (?:[ ](?:
        (?P<quoted>(?:'[^']*'|"[^"]*")+)
        |(?P<place>[A-Z]+(?:=[A-Z]+)?)\b
        |(?P<number>\d+(?:\.\d+)?)(?![\w.])
        |(?P<word>strict|base|sft|start|auto|bfloat16|float16|float32|cpu|cuda|dare|trim|della|\d+[KMGT]i?B)\b
    ))?""",
    re.VERBOSE,
)
_in_command = False


@contextmanager
def speaking_of_options() -> Iterator[None]:
    """Let messages speak of options, as long as a command runs in this process."""
    global _in_command
    before, _in_command = _in_command, True
    try:
        yield
    finally:
        _in_command = before


def for_caller(text: str) -> str:
    """Return a message as whoever called reads it: a command's user as it is written, others with parameters.

    >>> for_caller("take it with --take '^h[.]1$', or give --iteration N, --vocab sft or --overwrite")
    'take it with take=[r"^h[.]1$"], or give iteration=N, vocab="sft" or overwrite=True'
    """
    return text if _in_command else _OPTION.sub(_parameter, text)


def _parameter(found: re.Match[str]) -> str:
    option, word = found["option"], found["word"]
    name = option.replace("-", "_")
    if option in _FLAGS:
        return f"{name}=True" + found[0].removeprefix(f"--{option}")
    if found["quoted"]:
        (text,) = shlex.split(found["quoted"])
        value = repr(text) if '"' in text or text.endswith("\\") else f'r"{text}"'
    elif word or (option in _LISTS and found["place"]):
        value = f'"{word or found["place"]}"'
    else:
        value = found["number"] or found["place"]
    if not value:
        return name
    return f"{name}=[{value}]" if option in _LISTS else f"{name}={value}"


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
