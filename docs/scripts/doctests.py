"""Make the docstrings, which are plain text, read well as Markdown: used by mkdocstrings when the site is built.

Examples (`>>>`) become code blocks; Markdown alone would take them for quotations. Numbers of equations, which
stand at the right margin, are moved next to their formula, where a narrow page shows them.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^>>> .*\n(?:.+\n?)*)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?<=\S) {4,}(?=\(Eq)", "    ", text)
