"""Notes: what is worth knowing about a merge and is not an error, as data; the text is made where it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .messages import for_caller


@dataclass(frozen=True)
class Note:
    """A note: `code` says which, for programs; `text` names its `fields` in braces.

    >>> print(Note("vocabulary", "the vocabulary of {label} has {rows} rows", {"label": "base", "rows": 96}))
    note: the vocabulary of base has 96 rows
    """

    code: str
    text: str
    fields: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the note as people read it: commands name options, Python parameters."""
        return for_caller(f"note: {self.text.format(**self.fields)}")


def note(code: str, text: str, **fields: object) -> Note:
    """Return a note with these fields."""
    return Note(code, text, fields)
