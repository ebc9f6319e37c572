"""What is done to the pages when the site is built: what is copied, where links lead, what may be wrapped."""

from __future__ import annotations

import html
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

markdown = pytest.importorskip("markdown")
PluginError = pytest.importorskip("mkdocs.exceptions").PluginError

DOCS = Path(__file__).parents[2] / "docs"
SITE = runpy.run_path(str(DOCS / "scripts" / "site.py"))
EXTENSIONS = ["tables", "pymdownx.highlight", "pymdownx.superfences"]
SETTINGS = {"pymdownx.highlight": {"pygments_lang_class": True}}
BLOCK = re.compile(r"^```(console|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def rendered(text: str) -> str:
    content = markdown.markdown(text, extensions=EXTENSIONS, extension_configs=SETTINGS)
    return str(SITE["on_page_content"](content))


def typed(body: str) -> str:
    """What one types, read from the page's source."""
    lines: list[str] = []
    for line in body.splitlines():
        if line.startswith(("$ ", ">>> ", "... ")) and line != "...":
            lines.append(line.removeprefix("$ ").removeprefix(">>> ").removeprefix("... "))
        elif lines and lines[-1].endswith("\\"):
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_the_copy_button_copies_what_one_types(page: Path) -> None:
    for _, body in (found := BLOCK.findall(page.read_text(encoding="utf-8"))):
        assert typed(body)
    text = "\n\n".join(f"```{kind}\n{body}```" for kind, body in found)
    copied = re.findall(r'<div data-copy="([^"]*)"', rendered(text))
    assert [html.unescape(each) for each in copied] == [typed(body) for _, body in found]


def test_messages_may_be_wrapped_and_tables_may_not() -> None:
    text = rendered("```console\n$ imm-merge a b\nerror: no\nmodel  alpha\n```")
    assert '<span class="go message">error: no</span>' in text
    assert '<span class="go">model  alpha</span>' in text


def test_messages_alone_may_be_wrapped() -> None:
    assert "highlight messages" in rendered("```text\nround 0: no\nnote: yes\n```")
    assert "highlight messages" not in rendered("```text\nround 0: no\nmodel  alpha\n```")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("`run --in in --out -loss`", ["--in", "--out", "-loss"]),
        ("`--keep REGEX` or `-NAME`", []),  # are code of the class option
        ("`imm-merge base/x-y`", []),
        ("| a | b |\n|-|-|\n| 0.2 (0.1–0.3) | -0.9 [-1.00, +0.54], x |", ["(0.1–0.3)", "[-1.00, +0.54]"]),
        ("0.2 (0.1–0.3)", []),
    ],
)  # fmt: skip
def test_what_stays_on_one_line(text: str, whole: list[str]) -> None:
    assert re.findall('<span class="whole">(.*?)</span>', rendered(text)) == whole


def linked(text: str, url: str | None) -> str:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    return str(SITE["on_page_markdown"](text, page=page, config=SimpleNamespace(repo_url=url)))


@pytest.mark.parametrize(
    ("text", "with_address", "without"),
    [
        ("[`demo`](../examples/demo.py).", "[`demo`](https://x.org/a/b/blob/HEAD/examples/demo.py).", "`demo`."),
        ("[all](../examples)", "[all](https://x.org/a/b/tree/HEAD/examples)", "all"),
        ("[here](output.md#files)", "[here](output.md#files)", "[here](output.md#files)"),
        ("```\n[x](../nowhere)\n```", "```\n[x](../nowhere)\n```", "```\n[x](../nowhere)\n```"),
    ],
)  # fmt: skip
def test_links_out_of_the_docs(text: str, with_address: str, without: str) -> None:
    assert linked(text, "https://x.org/a/b/") == with_address
    assert linked(text, None) == without


def test_a_link_to_nothing_is_refused() -> None:
    with pytest.raises(PluginError, match=r"page\.md: there is no examples/nothing\.py"):
        linked("[x](../examples/nothing.py)", None)
