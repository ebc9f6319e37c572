"""Parts of pages that are made by programs.

They stand between `<!-- generated NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]


def update(page: str, parts: Mapping[str, str], description: str | None) -> None:
    """Rewrite the parts of a page; with --check on the command line, exit 1 if that would change it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is stale")
    arguments = parser.parse_args()
    path = (DOCS / page).resolve()
    shown = path.relative_to(DOCS.parent)
    text = old = path.read_text(encoding="utf-8")
    for name, content in parts.items():
        pattern = f"(<!-- generated {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c.strip()}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            sys.exit(f"error: {path.name} holds {count} parts called {name!r}; it must hold one")
    if text == old:
        return
    if arguments.check:
        sys.exit(f"error: {shown} is stale; run `python docs/scripts/{Path(sys.argv[0]).name}`")
    path.write_text(text, encoding="utf-8")
    print(f"{shown} rewritten")
