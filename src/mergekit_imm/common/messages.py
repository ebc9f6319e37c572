"""Pieces of messages: escaped names, sizes, options of the command line as parameters of Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LISTS = ("keep", "leave-out", "no-drop", "rename", "take")
_FLAGS = ("allow-nonfinite", "as-adapter", "copy-code", "dequantize", "dry-run", "overwrite", "restart", "verify")
_OTHERS = (
    "alpha base batch-size clip device drop dtype encoder importance iteration layer-factors max-length max-shard-size"
    " reference sample seed sft shrink sparsify start vocab workers"
).split()
_OPTION = re.compile(
    rf"""`imm-[^`]*`|(?<![\w-])--(?P<option>{"|".join((*_LISTS, *_FLAGS, *_OTHERS))})(?![\w-])
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
    """Keep the options in messages as they are, while a command runs in this process."""
    global _in_command
    before, _in_command = _in_command, True
    try:
        yield
    finally:
        _in_command = before


def for_caller(text: str) -> str:
    """Return a message unchanged for a user of a command, and with parameters for a caller in Python.

    Commands of ours between backticks keep their options.

    >>> for_caller("take it with --take '^h[.]1$', or give --iteration N, --vocab sft or --overwrite")
    'take it with take=[r"^h[.]1$"], or give iteration=N, vocab="sft" or overwrite=True'
    """
    return text if _in_command else _OPTION.sub(_parameter, text)


def _parameter(found: re.Match[str]) -> str:
    option, word = found["option"], found["word"]
    if option is None:  # a whole command
        return found[0]
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


def bytes_text(count: int) -> str:
    """Return a number of bytes in short.

    >>> bytes_text(3_090_000_000), bytes_text(512)
    ('3.09 GB', '512 bytes')
    """
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} bytes"


def count_text(count: int) -> str:
    """Return a number of parameters in short.

    >>> count_text(1_540_000_000), count_text(512)
    ('1.54 B', '512')
    """
    for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def first_few(texts: Sequence[str], between: str = "; ") -> str:
    """Return the first three of some texts, and an ellipsis if there are more.

    >>> first_few(["alpha", "drop"]), first_few(["a", "b", "c", "d"], ", ")
    ('alpha; drop', 'a, b, c, …')
    """
    return between.join([*texts[:3], *(["…"] if len(texts) > 3 else [])])


def shown(name: object, limit: int = 120) -> str:
    """Return an untrusted name for a message: escaped, and cut at `limit` characters.

    >>> shown("a\\nb")
    'a\\\\nb'
    """
    text = str(name).encode("unicode_escape", "surrogatepass").decode("ascii")
    return text if len(text) <= limit else text[: limit - 1] + "…"
