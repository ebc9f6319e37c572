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
    real, toy = (
        json.loads((EXAMPLES / name / "results.json").read_text(encoding="utf-8"))
        for name in ("real_model", "self_improvement")
    )
    blocks = evidence.tables(real) | {name: make(toy) for name, make in report.TABLES.items()}
    update("self-improvement.md", blocks, __doc__)


if __name__ == "__main__":
    main()
