"""What a merge was made of, and what came out: frozen data, and the JSON it is written as."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..common.checks import as_number
from ..common.json_files import parse_json, read_small
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError
from ..model.rename import parse_rename
from ..numerics.mask import arithmetic, check_round
from ..numerics.sparsifiers import parse_sparsify
from .layer_factors import check_factors, importance_factors

RECIPE_FILE, REPORT_FILE, CARD_FILE = "imm_recipe.json", "imm_report.json", "README.md"
RECIPE_FORMAT, RECIPE_VERSION = "mergekit_imm recipe", 1
VOCABS = ("strict", "base", "sft")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LEAST_BARE_SIZE = 1_000_000  # bytes; a smaller number without a unit is meant as GB
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


# Parameters that the first recipes did not have.
_LATEST = {"shrink", "clip", "layer_factors", "sparsify", "leave_out"}
_LATER = {"rename", "dequantize"} | _LATEST


@dataclass(frozen=True)
class Parameters:
    """Everything that decides the bytes of a merge, beside its inputs."""

    alpha: float = 0.5
    drop: float = 0.2
    seed: int = 0
    iteration: int = 0
    importance: Mapping[str, float] | None = None
    shrink: float = 1.0
    clip: tuple[float, float] | None = None
    layer_factors: Mapping[str, float] | str | None = None
    sparsify: str = "dare"
    reference: str = "start"
    dtype: str = "base"
    max_shard_size: int | None = None
    keep: tuple[str, ...] = ()
    take: tuple[str, ...] = ()
    no_drop: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    vocab: str = "strict"
    dequantize: bool = False
    allow_nonfinite: bool = False
    copy_code: bool = False
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ArgumentError for any value out of range."""
        arithmetic(alpha=self.alpha, drop=self.drop)
        check_round(self.seed, self.iteration)
        for name in ("alpha", "drop"):  # 1 and 1.0 are one recipe
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("seed", "iteration", "shrink", "max_shard_size"):
            object.__setattr__(self, name, as_number(getattr(self, name)))
        for name in ("importance", "layer_factors"):
            if isinstance(getattr(self, name), Mapping):
                values = {key: as_number(value) for key, value in getattr(self, name).items()}
                object.__setattr__(self, name, values)
        if isinstance(self.clip, tuple | list):
            object.__setattr__(self, "clip", tuple(map(as_number, self.clip)))
        dtype = str(self.dtype).removeprefix("torch.")  # of a torch.dtype, too
        object.__setattr__(self, "dtype", SHORT_DTYPES.get(dtype, dtype))
        if self.reference not in ("start", "base"):
            raise ArgumentError(f"reference is {self.reference!r}; it must be 'start' or 'base'")
        if self.dtype not in ("base", "start", *DTYPES):
            raise ArgumentError(
                f"dtype is {shown(self.dtype, 60)!r}; it must be one of base, start, {', '.join(DTYPES)}"
            )
        if self.vocab not in VOCABS:
            raise ArgumentError(f"vocab is {self.vocab!r}; it must be one of {', '.join(VOCABS)}")
        how = parse_sparsify(self.sparsify, self.drop)
        object.__setattr__(self, "sparsify", how.kind + (f":{how.epsilon:g}" if how.kind == "della" else ""))
        if self.layer_factors is not None:
            check_factors(self.layer_factors)
            if self.importance is not None:
                raise ArgumentError("--importance and --layer-factors are both given; a layer has one factor: give one")
        if self.importance is None and (self.shrink != 1 or self.clip is not None):
            raise ArgumentError("--shrink and --clip change the factors of --importance, and none is given")
        if self.importance is not None:
            importance_factors(self.importance, shrink=self.shrink, clip=self.clip)
        for rule in self.rename:
            parse_rename(rule)
        for pattern in self.leave_out:
            if not isinstance(pattern, str) or not pattern:
                raise ArgumentError(
                    f"leave_out holds {pattern!r}; give files by their path in the model, 'vit.safetensors'"
                )
        for option in ("keep", "take", "no_drop"):
            for pattern in getattr(self, option):
                try:
                    if not isinstance(pattern, str):
                        raise TypeError("give a string")
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    given = f"--{option.replace('_', '-')} {shlex.quote(shown(pattern))}"
                    raise ArgumentError(f"{given} is not a regular expression: {error}") from error


def parse_size(size: int | str) -> int:
    """Return a number of bytes from 5000000000, "5GB", "500MB" or "4GiB".

    >>> parse_size("5GB"), parse_size("4GiB")
    (5000000000, 4294967296)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if not match:
        raise ArgumentError(f"size {size!r} is not understood; write it as 5GB, 500MB or 4GiB")
    number, unit, binary = match.groups()
    bare = str(size).strip()
    if bare == number and 0 < float(number) < LEAST_BARE_SIZE:
        raise ArgumentError(f"size {size!r} is in bytes; write {number}GB, or {number}B if bytes are meant")
    value = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0))
    if value < 1:
        raise ArgumentError(f"size {size!r} must be at least one byte")
    return value


def _written(parameters: Parameters) -> dict[str, Any]:
    """Parameters as a recipe holds them: later ones only where they are used, so that older recipes stay the same."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(parameters)))
    unused = {each.name for each in fields(Parameters) if getattr(parameters, each.name) == each.default}
    return {name: value for name, value in values.items() if name not in _LATEST & unused}


def make_recipe(
    parameters: Parameters,
    inputs: Mapping[str, Mapping[str, Any]],
    config_changes: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the recipe of a merge as it is written: all that is needed to make the same bytes again."""
    return {
        "format": RECIPE_FORMAT,
        "version": RECIPE_VERSION,
        "formula": f"alpha*base + (1-alpha)*(start + factor*{parameters.sparsify.upper()}(sft-start))",
        "parameters": _written(parameters),
        "inputs": {role: dict(entry) for role, entry in inputs.items()},
        "config_changes": dict(config_changes),
        "history": history,
    }


def parse_parameters(recipe: Mapping[str, Any]) -> Parameters:
    """Return the parameters of a recipe that `read_recipe` returned."""
    values = dict(recipe["parameters"])
    for option in ("keep", "take", "no_drop", "rename", "leave_out"):
        values[option] = tuple(values.get(option, ()))
    values["clip"] = tuple(values["clip"]) if values.get("clip") else None
    return Parameters(**values)


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe in a folder, or None if it has none. Raises CheckpointError as `parse_recipe` does."""
    path = folder / RECIPE_FILE
    try:
        if not path.exists():
            return None
        content = read_small(path)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}; merge again, or restore it") from error
    return parse_recipe(content, str(path))


def parse_recipe(content: bytes, where: str) -> dict[str, Any]:
    """Return the recipe in a file's bytes. Raises CheckpointError for one that is damaged or of a later version."""
    where = shown(where, 300)
    try:
        recipe: dict[str, Any] = parse_json(content)
        if recipe["format"] != RECIPE_FORMAT:
            raise ValueError(f"its format is {recipe['format']!r}")
        if recipe["version"] == RECIPE_VERSION:
            missing = {each.name for each in fields(Parameters)} - set(recipe["parameters"]) - _LATER
            if missing:
                raise ValueError(f"its parameters lack {', '.join(sorted(missing))}")
            json.dumps(recipe, allow_nan=False)  # it goes into the recipe of the next round
            if not isinstance(parse_parameters(recipe).importance, dict | None):
                raise ValueError("its importance is no mapping of layers")
            if not isinstance(recipe["history"], list) or not all(isinstance(each, dict) for each in recipe["history"]):
                raise ValueError("its history is no list of recipes")
            if not {"base", "sft"} <= set(recipe["inputs"]) <= {"base", "sft", "start"}:
                raise ValueError("its inputs are not base and sft")
            for entry in recipe["inputs"].values():
                if not entry["path"] or not all(isinstance(entry.get(x, ""), str) for x in ("path", "repo", "commit")):
                    raise ValueError("the place of an input is missing")
                for file in entry["files"].values():
                    if not isinstance(file["size"], int) or not isinstance(file["fingerprint"], str):
                        raise ValueError("a size or fingerprint is missing")
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged: its parameters are not those of a merge; restore it") from error
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where} is damaged: {shown(error, 200)}; merge again, or restore it") from error
    if recipe["version"] != RECIPE_VERSION:
        raise CheckpointError(
            f"{where} is of version {shown(recipe['version'])}, this program reads {RECIPE_VERSION};"
            " upgrade mergekit-imm"
        )
    return recipe


def history_of(recipe: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the history for a round that starts from the model with this recipe, oldest first."""
    if recipe is None:
        return []
    return [*recipe["history"], {key: value for key, value in recipe.items() if key != "history"}]


def without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a merge: its recipe without the paths as typed, which may spell one place in many ways.

    That an input is a file remains: it comes without the other files of a folder.

    >>> one, other = ({"inputs": {"base": {"path": path, "files": {}}}} for path in ("base", "./base/"))
    >>> without_places(one) == without_places(other)
    True
    """
    found = dict(recipe)
    if isinstance(found.get("inputs"), dict):
        found["inputs"] = {
            role: _without_place(entry) if isinstance(entry, dict) else entry for role, entry in found["inputs"].items()
        }
    if isinstance(found.get("history"), list):
        found["history"] = [without_places(each) if isinstance(each, dict) else each for each in found["history"]]
    return found


def _without_place(entry: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in entry.items() if key != "path"}
    return {**rest, "form": "one file"} if str(entry.get("path", "")).endswith(".safetensors") else rest


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """Say where two recipes differ, `parameters.alpha: 0.3, now 0.5`."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{place}{shown(key, 60)}.")
        elif one != other and key == "fingerprint":
            found.append(f"{place.rstrip('.')} has changed")
        elif one != other:
            found.append(f"{place}{shown(key, 60)}: {shown(json.dumps(one), 60)}, now {shown(json.dumps(other), 60)}")
    return found


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return the bytes a recipe or report is written as."""
    written = bytearray()  # piece by piece: a report of ten thousands of tensors would be there several times
    for piece in json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False).iterencode(content):
        written += piece.encode()
    return bytes(written) + b"\n"


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoints` did, and what `imm-merge --json` prints.

    status: "merged", "already merged" or "dry run". Counts of tensors by what happened to them: `merged`,
    `kept` (base's), `taken` (sft's), `copied` (integer and bool). Bytes are those of the streaming phase of this
    run, tensors read and files written; where nothing was merged, those that were planned. `disk_needed` and
    `disk_free` are bytes at the output when planning, `memory` an estimate of the peak. `seconds`: plan, total, and,
    of a merge, stream (first read to last sync). The merges of a sweep share one reading and one clock: each report
    tells them whole. `renamed`: names of
    sft and start that are others in the base, by rule, and of how many tensors. `notes`: what is worth knowing and not
    an error. `refused`: of a dry run, that there is too little
    space; a merge would be refused for it. `verified`: every byte was computed again, and compared, before the folder
    appeared.
    """

    status: str
    out: str
    parameters: dict[str, Any]
    parameter_count: int
    tensors: dict[str, int]
    files: list[str]
    bytes_read: int
    bytes_written: int
    disk_needed: int
    disk_free: int
    memory: int
    workers: int
    device: str
    seconds: dict[str, float]
    kinds: list[dict[str, Any]]
    config_changes: dict[str, Any]
    side_files: dict[str, list[str]]
    left_out: dict[str, list[str]]
    renamed: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str = ""
    verified: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)
