"""Samples of models from JSON lines, as frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.json_files import parse_json, plain_size, without_duplicates
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError, MismatchError

KEYS = ("problem", "response", "correct", "answer", "model", "greedy", "level", "ood")


@dataclass(frozen=True)
class Response:
    """One answer of a model, and whether it is right."""

    text: str
    correct: bool


@dataclass(frozen=True)
class Problem:
    """A problem, and what one model answered: `sampled` in the order of the file, and greedily, if it did."""

    name: str
    level: int | None
    ood: bool
    sampled: tuple[Response, ...]
    greedy: Response | None

    @property
    def counts(self) -> tuple[int, int]:
        """How many samples there are, and how many of them are right."""
        return len(self.sampled), sum(response.correct for response in self.sampled)


@dataclass(frozen=True)
class Model:
    """A model by its answers to each problem, which are keyed by name."""

    name: str
    problems: Mapping[str, Problem]


@dataclass(frozen=True)
class _Line:
    """A line as it was read."""

    where: str
    problem: str
    model: str | None
    response: Response
    greedy: bool
    level: int | None
    ood: bool


def read_samples(paths: Sequence[str | Path]) -> tuple[Model, ...]:
    """Read samples of models from files of JSON lines, one sample a line.

        {"problem": "gsm8k-17", "response": "...", "correct": true, "model": "round 1",
         "greedy": false, "level": 3, "ood": false}

    Args: `paths`, the files. `problem` and `response` are required, and either `correct` or `answer`, the right answer,
    which the response is then judged by. `model` is by default the file's name without suffix; `greedy` false, for a
    sample; `level`, an integer, none; `ood` (not of the domain of the training) false. Other keys are permitted, and
    not read, unless they look like a misspelt one of these. Empty lines hold no sample.

    Returns the models in the order in which they first appear. Raises CheckpointError, with file and line, for what
    cannot be read, and MismatchError where lines contradict each other. The form of the lines is ours.

    >>> _ = Path("base.jsonl").write_text('{"problem": "1+1", "response": "It is 2", "correct": true}')
    >>> read_samples(["base.jsonl"])[0].problems["1+1"].counts
    (1, 1)
    """
    if not paths:
        raise ArgumentError("there are no files of samples; give at least one")
    lines: dict[str, list[_Line]] = {}
    unnamed: dict[str, Path] = {}  # model that a file is called by -> that file
    sources: set[tuple[str, Path]] = set()
    files = [Path(each).expanduser() for each in paths]
    for number, path in enumerate(files):
        if path.resolve() in [each.resolve() for each in files[:number]]:
            raise ArgumentError(f"the file {shown(path)} is given twice; its samples would count twice")
        for line in _lines(path):
            if line.model is None:
                unnamed[path.stem] = path
            name = path.stem if line.model is None else line.model
            lines.setdefault(name, []).append(line)
            sources.add((name, path))
    for name, path in sources:
        if name in unnamed and path != unnamed[name]:
            raise MismatchError(
                f"{shown(unnamed[name])} and {shown(path)} would both be the model '{shown(name)}'; "
                f'give each line a "model", or the files other names'
            )
    return tuple(Model(name, _problems(found)) for name, found in lines.items())


def _problems(lines: Sequence[_Line]) -> dict[str, Problem]:
    """The lines of one model, by problem."""
    grouped: dict[str, list[_Line]] = {}
    for line in lines:
        first = grouped.setdefault(line.problem, [line])[0]
        if line is first:
            continue
        for key in ("level", "ood"):
            if getattr(line, key) != getattr(first, key):
                raise MismatchError(
                    f"problem '{shown(line.problem)}' has {key} {getattr(first, key)} in {first.where}, and "
                    f"{getattr(line, key)} in {line.where}; give all its lines the same"
                )
        if line.greedy and (other := next((each for each in grouped[line.problem] if each.greedy), None)):
            raise MismatchError(
                f"problem '{shown(line.problem)}' has two greedy answers of one model, in {other.where} and "
                f'{line.where}; keep one, or mark samples with "greedy": false'
            )
        grouped[line.problem].append(line)
    return {
        name: Problem(
            name, found[0].level, found[0].ood, tuple(line.response for line in found if not line.greedy),
            next((line.response for line in found if line.greedy), None),
        )
        for name, found in grouped.items()
    }  # fmt: skip


def _lines(path: Path) -> list[_Line]:
    try:
        plain_size(path)
        with path.open("rb") as file:
            found = [_line(content, f"{shown(path)}, line {n}") for n, content in enumerate(file, 1) if content.strip()]
    except OSError as error:
        raise CheckpointError(f"the samples {shown(path)} cannot be read: {error.strerror}") from error
    if not found:
        raise CheckpointError(f"the samples {shown(path)} hold nothing; write one JSON object a line")
    return found


def _line(content: bytes, where: str) -> _Line:
    try:
        line = parse_json(content, without_duplicates)
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {shown(error, 200)}; write one object a line") from error
    if not isinstance(line, dict):
        raise CheckpointError(f'{where}: not an object; write {{"problem": ..., "response": ..., "correct": ...}}')
    for key in line:
        if meant := _misspelt(key):
            raise CheckpointError(
                f"{where}: the key '{shown(key)}' looks like '{meant}'; correct it, or give it a name further from that"
            )

    def value(key: str, kind: type, default: Any = None) -> Any:
        if line.get(key) is None and (key not in line or key in ("model", "level")):
            return default
        if type(line[key]) is not kind:
            what = {bool: "true or false", int: "an integer", str: "a text"}[kind]
            raise CheckpointError(f"{where}: {key} is {shown(repr(line[key]), 60)}; it must be {what}")
        return line[key]

    problem, response = value("problem", str), value("response", str)
    for key, found in (("problem", problem), ("response", response)):
        if found is None:
            raise CheckpointError(f"{where}: there is no {key}; each line needs a problem and a response")
    correct = value("correct", bool)
    if correct is None:
        answer = line.get("answer")
        number = not isinstance(answer, bool) and isinstance(answer, int | float) and -math.inf < answer < math.inf
        if not (number or isinstance(answer, str)):
            raise CheckpointError(
                f'{where}: there is no "correct": true or false, nor an "answer", a text or a number, to judge by'
            )
        from .answers import is_correct

        correct = is_correct(response, str(answer))
    return _Line(
        where, problem, value("model", str), Response(response, correct), value("greedy", bool, False),
        value("level", int), value("ood", bool, False),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _misspelt(key: str) -> str | None:
    """The known key that an unknown one may be meant for; names of several words are others' own."""
    if key in KEYS or "_" in key:
        return None
    return next(iter(get_close_matches(key.lower(), KEYS, n=1, cutoff=0.66)), None)
