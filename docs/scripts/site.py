"""What mkdocs does to the pages when it builds the site: a hook, named in mkdocs.yml.

- Links to files outside docs, such as `[the script](../examples/demo.py)`, work on a forge as they are. On the site
  they lead to the same file below `repo_url`; without one, their text stays.
- The copy button of a session copies what one types, neither prompts nor outputs.
- Long messages in outputs are wrapped as a terminal would; tables and commands are not. Options and the ranges of
  numbers in tables stay on one line.
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
OPTION = re.compile(r"<code>(?=--?[\w -]{1,24}</code>)")
INLINE = re.compile(r"<code>[^<\n]+</code>")
WORD = re.compile(r"(?<=[\s>(])--?[A-Za-z][\w-]*")
CELL = re.compile(r"<td\b[^>]*>[^<]+</td>")
RANGE = re.compile(r"\([\d.]+–[\d.]+\)|\[[-+\d.]+, [-+\d.]+\]")
MESSAGE_START = r"(?:error|note|warning|refused|round \d+): "
MESSAGE = re.compile(rf'<span class="go">(?={MESSAGE_START})')
MESSAGES = re.compile(
    rf'<div class="language-text highlight">(?=<pre>(?:<span></span>)?<code>(?:{MESSAGE_START}[^\n]+\n)+</code>)'
)


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
    content = OPTION.sub('<code class="option">', content)
    content = INLINE.sub(lambda code: WORD.sub(_whole, code[0]), content)
    content = CELL.sub(lambda cell: RANGE.sub(_whole, cell[0]), content)
    content = MESSAGES.sub('<div class="language-text highlight messages">', content)
    return SESSION.sub(_session, content)


def _whole(found: re.Match[str]) -> str:
    return f'<span class="whole">{found[0]}</span>'


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
