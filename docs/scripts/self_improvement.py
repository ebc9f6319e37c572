"""Write what examples/self_improvement/experiment.py found into docs/self-improvement.md.

python docs/scripts/self_improvement.py [--check]
"""

from __future__ import annotations

import json
import sys

from pages import DOCS, update

EXAMPLE = DOCS.parent / "examples" / "self_improvement"
sys.path.append(str(EXAMPLE))

from report import TABLES  # noqa: E402


def main() -> None:
    """Rewrite the page, or check it."""
    results = json.loads((EXAMPLE / "results.json").read_text(encoding="utf-8"))
    update("self-improvement.md", {name: make(results) for name, make in TABLES.items()}, __doc__)


if __name__ == "__main__":
    main()
