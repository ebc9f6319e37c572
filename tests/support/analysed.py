"""Models and texts for the commands that run models: their vocabulary, prompts with responses, JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["<unk>", "<s>", "</s>", "merge", "back", "base"]  # vocabulary of `models.save`
RESPONSES = [("merge back", "base merge"), ("back", "merge base back base"), ("base base", "back")]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def link_and_write(models: Path, folder: Path, responses: list[tuple[str, str]]) -> None:
    """Put links to models, and their texts, into a folder."""
    for model in models.iterdir():
        (folder / model.name).symlink_to(model)
    jsonl(folder / "pairs.jsonl", [{"prompt": p, "response": r, "id": 1} for p, r in responses])
    jsonl(folder / "texts.jsonl", [{"text": f"{p} {r}"} for p, r in responses])
