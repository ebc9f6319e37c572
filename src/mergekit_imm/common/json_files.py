"""JSON from files of others: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DEPTH = 64  # no config is nested as deep; Python ends at a thousand
SIZE = 256 << 20  # bytes; the index of a million tensors has half of that

Pairs = Callable[[Iterable[tuple[str, Any]]], dict[str, Any]]


def parse_json(content: bytes, pairs: Pairs | None = None) -> Any:
    """Parse JSON; `pairs` makes the objects. Raises ValueError, also for text no file can hold and endless nesting."""
    try:
        parsed = json.loads(content, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [parsed]
    for _ in range(DEPTH + 1):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
    if level:
        raise ValueError(f"it is nested more than {DEPTH} levels deep")
    if rb"\u" in content:
        json.dumps(parsed, ensure_ascii=False).encode()  # half a pair of surrogates is a UnicodeEncodeError
    return parsed


def without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping; a name that stands there twice is a ValueError."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the name {key!r} stands there twice")
        content[key] = value
    return content


def read_small(path: Path) -> bytes:
    """Return the bytes of a file that is small by its nature. Raises OSError, also for one that is not."""
    size = plain_size(path)
    if size > SIZE:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than {SIZE}")
    return path.read_bytes()


def plain_size(path: Path) -> int:
    """Return the size of a plain file. Raises OSError, also for what is none: whoever opened a pipe would wait."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    return status.st_size


def is_utf8(text: str) -> bool:
    """Whether a text can be written: of a name whose bytes are no UTF-8, Python makes half characters.

    >>> is_utf8("modèle"), is_utf8(b"\\xff".decode(errors="surrogateescape"))
    (True, False)
    """
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
