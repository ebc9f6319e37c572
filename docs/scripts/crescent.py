"""Write what examples/crescent.py found into docs/synthesis.md.

python docs/scripts/crescent.py [--check]
"""

from __future__ import annotations

import importlib.util
import json
import sys

from pages import DOCS, update

EXAMPLES = DOCS.parent / "examples"
PAGE = "synthesis.md"


def main() -> None:
    """Rewrite the page, or check it."""
    spec = importlib.util.spec_from_file_location("crescent_example", EXAMPLES / "crescent.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.append(str(EXAMPLES))  # for what it imports
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    results = json.loads((EXAMPLES / "crescent.json").read_text(encoding="utf-8"))
    update(PAGE, {name: make(results) for name, make in example.TABLES.items()}, __doc__)


if __name__ == "__main__":
    main()
