"""The recipe of a merge, imm_recipe.json: everything needed to make the same bytes again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from io import BytesIO
from pathlib import Path
from typing import Any

from ..common.json_files import indented, parse_json, read_small
from ..common.messages import shown
from ..errors import CheckpointError
from .options import MERGE_DEFAULTS, MergeOptions

RECIPE_FILE, REPORT_FILE, CARD_FILE = "imm_recipe.json", "imm_report.json", "README.md"
STATEMENT_FILE = "imm_statement.json"  # with --digests
RECIPE_FORMAT, RECIPE_VERSION = "mergekit_imm recipe", 1

# Options that the first recipes lack. Recipes store them only when used, except these two.
_LATE = {each.name for each in fields(MergeOptions) if each.metadata.get("late")}
_ALWAYS_WRITTEN = {"rename", "dequantize"}


def make_recipe(
    options: MergeOptions,
    inputs: Mapping[str, Mapping[str, Any]],
    config_changes: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the recipe of a merge as plain data; unused late options are left out, so that recipes stay the same."""
    left_out = {name for name in _LATE - _ALWAYS_WRITTEN if getattr(options, name) == MERGE_DEFAULTS[name]}
    values = asdict(options) | {"iteration": options.round}
    return {
        "format": RECIPE_FORMAT,
        "version": RECIPE_VERSION,
        "formula": f"alpha*base + (1-alpha)*(start + factor*{options.sparsify.upper()}(sft-start))",
        "parameters": json.loads(json.dumps({name: values[name] for name in values if name not in left_out})),
        "inputs": {role: dict(entry) for role, entry in inputs.items()},
        "config_changes": dict(config_changes),
        "history": history,
    }


def options_in(recipe: Mapping[str, Any]) -> MergeOptions:
    """Return the options in a recipe that `read_recipe` returned."""
    return MergeOptions(**recipe["parameters"])


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """Read the recipe in a folder; None if there is none. Raises CheckpointError."""
    path = folder / RECIPE_FILE
    try:
        if not path.exists():
            return None
        content = read_small(path)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}; merge again, or restore it") from error
    return parse_recipe(content, str(path))


def parse_recipe(content: bytes, where: str) -> dict[str, Any]:
    """Parse a recipe. Raises CheckpointError if it is damaged or of another version."""
    where = shown(where, 300)
    try:
        recipe: dict[str, Any] = parse_json(content)
        if recipe["format"] != RECIPE_FORMAT:
            raise ValueError(f"its format is {recipe['format']!r}")
        if recipe["version"] == RECIPE_VERSION:
            missing = set(MERGE_DEFAULTS) - set(recipe["parameters"]) - _LATE
            if missing:
                raise ValueError(f"its parameters lack {', '.join(sorted(missing))}")
            json.dumps(recipe, allow_nan=False)  # the next round's recipe will include it
            if not isinstance(options_in(recipe).importance, dict | None):
                raise ValueError("its importance is not a mapping of layers")
            if not isinstance(recipe["history"], list) or not all(isinstance(each, dict) for each in recipe["history"]):
                raise ValueError("its history is not a list of recipes")
            if not {"base", "sft"} <= set(recipe["inputs"]) <= {"base", "sft", "start"}:
                raise ValueError("its inputs are not base and sft")
            for entry in recipe["inputs"].values():
                if not entry["path"] or not all(isinstance(entry.get(x, ""), str) for x in ("path", "repo", "commit")):
                    raise ValueError("the path of an input is missing")
                for file in entry["files"].values():
                    if not isinstance(file["size"], int) or not isinstance(file["fingerprint"], str):
                        raise ValueError("a size or fingerprint is missing")
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged: its parameters are not those of a merge; restore it") from error
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where} is damaged: {shown(error, 200)}; merge again, or restore it") from error
    if recipe["version"] != RECIPE_VERSION:
        raise CheckpointError(
            f"{where} has version {shown(recipe['version'])}, this program reads {RECIPE_VERSION}; upgrade mergekit-imm"
        )
    return recipe


def history_of(recipe: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the history for a round that starts from the model with this recipe: recipes, oldest first."""
    if recipe is None:
        return []
    return [*recipe["history"], {key: value for key, value in recipe.items() if key != "history"}]


def without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without the paths of its inputs, to compare recipes: one place can be spelt in many ways.

    An input that is a single file stays marked, since it comes without the side files of a folder.

    >>> one, other = ({"inputs": {"base": {"path": path, "files": {}}}} for path in ("base", "./base/"))
    >>> without_places(one) == without_places(other)
    True
    """
    rest = dict(recipe)
    if isinstance(rest.get("inputs"), dict):
        rest["inputs"] = {
            role: _without_place(entry) if isinstance(entry, dict) else entry for role, entry in rest["inputs"].items()
        }
    if isinstance(rest.get("history"), list):
        rest["history"] = [without_places(each) if isinstance(each, dict) else each for each in rest["history"]]
    return rest


def _without_place(entry: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in entry.items() if key != "path"}
    return {**rest, "form": "one file"} if str(entry.get("path", "")).endswith(".safetensors") else rest


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """List the differences between two recipes, such as `parameters.alpha: 0.3, now 0.5`."""
    lines: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            lines += differences(one, other, f"{place}{shown(key, 60)}.")
        elif one != other and key == "fingerprint":
            lines.append(f"{place.rstrip('.')} has changed")
        elif one != other:
            lines.append(f"{place}{shown(key, 60)}: {shown(json.dumps(one), 60)}, now {shown(json.dumps(other), 60)}")
    return lines


def to_json(content: Mapping[str, Any]) -> bytes:
    """Encode a recipe, a report or an index."""
    written = BytesIO()  # piece by piece: a report of a million tensors would be in memory several times
    for piece in indented(content):
        written.write(piece.encode())
    written.write(b"\n")
    return written.getvalue()
