"""Write what examples/real_model and examples/self_improvement found into docs/self-improvement.md.

python docs/scripts/self_improvement.py [--check]
"""

from __future__ import annotations

import json
import sys

from pages import DOCS, update

EXAMPLES = DOCS.parent / "examples"
sys.path += [str(EXAMPLES / "real_model"), str(EXAMPLES / "self_improvement")]

import evidence  # noqa: E402
import report  # noqa: E402


def main() -> None:
    """Rewrite the page, or check it."""
    blocks: dict[str, str] = {}
    for folder, tables in (("real_model", evidence.TABLES), ("self_improvement", report.TABLES)):
        results = json.loads((EXAMPLES / folder / "results.json").read_text(encoding="utf-8"))
        blocks |= {name: make(results) for name, make in tables.items()}
    update("self-improvement.md", blocks, __doc__)


if __name__ == "__main__":
    main()
