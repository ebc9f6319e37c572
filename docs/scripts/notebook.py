"""Run examples/notebook.ipynb, save its outputs in it, and show it as docs/notebook.md.

    python docs/scripts/notebook.py [--check]

Cells run in this process, in a temporary folder; what a notebook would show of the last expression is its output: HTML
if the value has it, else its repr. With --check nothing is written: it fails if a cell fails, if an output differs in
more than its numbers, or if the page is not that of the notebook. Half a minute on two cores.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
NOTEBOOK, PAGE = DOCS.parent / "examples" / "notebook.ipynb", DOCS / "notebook.md"
NUMBER = re.compile(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?")


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def run_cell(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Run a cell; return its outputs, as a notebook holds them."""
    *body, last = ast.parse(source).body
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        if not isinstance(last, ast.Expr):
            body.append(last)
        exec(compile(ast.Module(body, []), f"<cell {count}>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = lines(value._repr_html_())
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return outputs


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook with the outputs of this run."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = run_cell("".join(cell["source"]), names, count)
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def page(notebook: dict[str, Any]) -> str:
    """Return a notebook as a page: text, code, and the outputs as a notebook shows them."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```py\n{source}\n```")  # not `python`: run_examples.py would run it again
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "text/html" in output["data"]:
                parts.append("".join(output["data"]["text/html"]))
            else:
                parts.append(f"```text\n{''.join(output['data']['text/plain'])}\n```")
    return "\n\n".join(parts) + "\n"


def without_numbers(notebook: dict[str, Any]) -> list[str]:
    """Return the outputs as text, with the runs of numbers and pictures of numbers blanked."""
    texts = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            text = output.get("text") or output["data"]["text/plain"]
            texts.append(NUMBER.sub("0", "".join(text)))
    return texts


def main() -> None:
    kept = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = run(kept)
    os.chdir(DOCS)
    if "--check" in sys.argv:
        if without_numbers(found) != without_numbers(kept) or page(kept) != PAGE.read_text(encoding="utf-8"):
            sys.exit(f"{NOTEBOOK.name} or {PAGE.name} is out of date: run docs/scripts/notebook.py")
        return
    NOTEBOOK.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
