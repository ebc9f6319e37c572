"""What mkdocs does to the pages when it builds the site: a hook, named in mkdocs.yml.

- Links to files outside docs, such as `[the script](../examples/demo.py)`, work on a forge as they are. On the site
  they lead to the same file below `repo_url`; without one, their text stays.
- The copy button of a session copies what one types, neither prompts nor outputs.
- Long messages in outputs are wrapped as a terminal would; tables and commands are not. Options stay on one line.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
OUTSIDE = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)#\s]+)\)")
SESSION = re.compile(r'<div class="language-(?:console|pycon) highlight">(?P<code>.*?)</div>', re.DOTALL)
PROMPT = re.compile(r'<span class="gp">(?:\$|&gt;&gt;&gt;|\.\.\.|&gt;) ?</span>')
OPTION = re.compile(r"<code>(?=--[\w -]{1,24}</code>)")
MESSAGE = re.compile(r'<span class="go">(?=(?:error|note|warning|refused|round \d+): )')


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turn links to files outside docs into links to the repository."""

    def elsewhere(link: re.Match[str]) -> str:
        file = ROOT / link["path"]
        if not file.exists():
            raise PluginError(f"{page.file.src_uri}: there is no {link['path']}")
        if not config.repo_url:
            return link["text"]
        kind = "tree" if file.is_dir() else "blob"
        return f"[{link['text']}]({config.repo_url.rstrip('/')}/{kind}/HEAD/{link['path']})"

    pieces, at = [], 0
    for block in FENCED.finditer(markdown):
        pieces += [OUTSIDE.sub(elsewhere, markdown[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*pieces, OUTSIDE.sub(elsewhere, markdown[at:])])


def on_page_content(content: str, **_: Any) -> str:
    """Tell the copy button what to copy, and mark what may be wrapped, or may not."""
    return SESSION.sub(_session, OPTION.sub('<code class="option">', content))


def _session(block: re.Match[str]) -> str:
    typed = html.escape(commands(block["code"]))
    return MESSAGE.sub('<span class="go message">', block[0]).replace("<div ", f'<div data-copy="{typed}" ', 1)


def commands(code: str) -> str:
    """Return what is typed in a highlighted session: the lines after prompts, and those that continue them."""
    lines, more = [], False
    for line in code.splitlines():
        if PROMPT.search(line) or more:
            text = html.unescape(re.sub(r"<[^>]+>", "", PROMPT.sub("", line)))
            lines.append(text)
            more = text.endswith("\\")
    return "\n".join(lines)
