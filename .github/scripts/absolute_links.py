"""Make the README's links and pictures absolute, and add the project's addresses, before a release is built.

    python .github/scripts/absolute_links.py https://github.com/OWNER/NAME v1.2.3

An index shows the README without the repository around it. The address stands nowhere else: the workflow knows it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?://|#|mailto:)([^)\s]+)\)")


def absolute(text: str, address: str, tag: str) -> str:
    """Return Markdown with the links into the repository made absolute, and pictures as raw files.

    >>> absolute("![a](docs/a.png) [b](docs/b.md#c) [d](https://e.org)", "https://forge.example/o/n", "v1")
    '![a](https://forge.example/o/n/raw/v1/docs/a.png) [b](https://forge.example/o/n/blob/v1/docs/b.md#c) [d](https://e.org)'
    """
    return LINK.sub(lambda m: f"{m[1]}{m[2]}({address}/{'raw' if m[1] else 'blob'}/{tag}/{m[3]})", text)


def main(address: str, tag: str) -> None:
    """Rewrite README.md and pyproject.toml in place."""
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    text = readme.read_text(encoding="utf-8")
    missing = [m[3] for m in LINK.finditer(text) if not (ROOT / m[3].partition("#")[0]).exists()]
    if missing:
        sys.exit(f"error: README.md links to what is not there: {', '.join(missing)}")
    readme.write_text(absolute(text, address, tag), encoding="utf-8")
    urls = {"Repository": "", "Changelog": f"/blob/{tag}/CHANGELOG.md", "Issues": "/issues"}
    lines = "".join(f'{name} = "{address}{path}"\n' for name, path in urls.items())
    old = project.read_text(encoding="utf-8")
    if "[project.urls]" in old:
        sys.exit("error: pyproject.toml has project.urls already")
    marker = "[project.scripts]\n"
    project.write_text(old.replace(marker, f"[project.urls]\n{lines}\n{marker}", 1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
