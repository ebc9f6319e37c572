"""What a release makes of the README: links that work away from the repository."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / ".github" / "scripts" / "absolute_links.py"))


def test_links_become_absolute() -> None:
    text = "![a](docs/a.png) [b](docs/b.md#c) [d](https://e.org) [f](#here)"
    assert SCRIPT["absolute"](text, "https://forge.example/o/n", "v1") == (
        "![a](https://forge.example/o/n/raw/v1/docs/a.png) [b](https://forge.example/o/n/blob/v1/docs/b.md#c)"
        " [d](https://e.org) [f](#here)"
    )


def test_the_readme_links_to_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [found[3].partition("#")[0] for found in SCRIPT["LINK"].finditer(text)]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []
