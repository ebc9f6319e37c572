"""Read samples of models from JSON lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.checks import as_items, as_path
from ..common.display import Displayed, Summary
from ..common.json_files import parse_json, plain_size, without_duplicates
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError, MismatchError

KEYS = ("problem", "response", "correct", "answer", "confidence", "model", "greedy", "level", "ood")


@dataclass(frozen=True)
class Response:
    """One response of a model, whether it is right, and how probable the model held that to be, from 0 to 1."""

    text: str
    correct: bool
    confidence: float | None = None


@dataclass(frozen=True, repr=False)
class Problem(Displayed):
    """A problem with one model's responses: `sampled`, in the order of the file, and the greedy one, if any."""

    name: str
    level: int | None
    ood: bool
    sampled: tuple[Response, ...]
    greedy: Response | None

    @property
    def counts(self) -> tuple[int, int]:
        """The number of samples, and of right ones."""
        return len(self.sampled), sum(response.correct for response in self.sampled)

    def _summary(self) -> Summary:
        number, right = self.counts
        greedy = "" if self.greedy is None else f", greedy {'right' if self.greedy.correct else 'wrong'}"
        return Summary(f"{shown(self.name)}: {right} of {number} samples right{greedy}")


@dataclass(frozen=True, repr=False)
class Model(Displayed):
    """A model with its responses, problem name -> problem."""

    name: str
    problems: Mapping[str, Problem]

    def _summary(self) -> Summary:
        counts = [each.counts for each in self.problems.values()]
        right, number = (sum(each[i] for each in counts) for i in (1, 0))
        return Summary(f"{shown(self.name)}: {len(counts)} problems, {right} of {number} samples right")


@dataclass(frozen=True)
class _Line:
    """One parsed line, and where it stands."""

    where: str
    problem: str
    model: str | None
    response: Response
    greedy: bool
    level: int | None
    ood: bool
    answer: str | None


def read_samples(paths: Sequence[str | Path], *, cut: bool = True) -> tuple[Model, ...]:
    """Read samples of models from files of JSON lines, one sample per line.

        {"problem": "gsm8k-17", "response": "...", "correct": true, "confidence": 0.8, "model": "round 0",
         "greedy": false, "level": 3, "ood": false}

    Required are `problem`, `response`, and either `correct` or `answer`, the right answer to judge the response by with
    `is_correct`, which takes `cut`.
    `model` defaults to the file's name without suffix, `greedy` to false, `level` (an integer) to none, `ood` (outside
    the training's domain) to false, `confidence` (from 0 to 1) to none: all responses of a model have one, or none has.
    Other keys are ignored, unless they look like misspellings of these. Empty lines are skipped.

    Returns the models in the order of their first lines. Raises CheckpointError, with file and line, for invalid lines,
    MismatchError for lines that contradict each other, and ExtraError for an `answer` without math-verify. The format
    is ours.

    >>> _ = Path("base.jsonl").write_text('{"problem": "1+1", "response": "It is 2", "correct": true}')
    >>> read_samples(["base.jsonl"])[0].problems["1+1"].counts
    (1, 1)
    """
    if not paths:
        raise ArgumentError("paths is empty; give at least one file of samples")
    lines: dict[str, list[_Line]] = {}
    unnamed: dict[str, Path] = {}  # model named after a file -> that file
    sources: set[tuple[str, Path]] = set()
    files = [
        Path(as_path("a path", each, "a file of samples")).expanduser()
        for each in as_items("paths", paths, "files of samples")
    ]
    for number, path in enumerate(files):
        if path.resolve() in [each.resolve() for each in files[:number]]:
            raise ArgumentError(f"the file {shown(path)} is given twice; leave it out once")
        for line in _lines(path, cut):
            if line.model is None:
                unnamed[path.stem] = path
            name = path.stem if line.model is None else line.model
            lines.setdefault(name, []).append(line)
            sources.add((name, path))
    for name, path in sources:
        if name in unnamed and path != unnamed[name]:
            raise MismatchError(
                f"{shown(unnamed[name])} and {shown(path)} would both be the model '{shown(name)}'; "
                f'give each line a "model", or rename a file'
            )
    _check_answers([line for found in lines.values() for line in found])
    return tuple(Model(name, _problems(found)) for name, found in lines.items())


def _check_answers(lines: Sequence[_Line]) -> None:
    """Raise MismatchError if a problem has two right answers."""
    first: dict[str, _Line] = {}
    for line in lines:
        other = first.setdefault(line.problem, line) if line.answer is not None else line
        if line.answer != other.answer:
            from .answers import same_answer

            if not same_answer(str(line.answer), str(other.answer)):
                raise MismatchError(
                    f"problem '{shown(line.problem)}' has the answer '{shown(other.answer, 40)}' in {other.where}, but "
                    f"'{shown(line.answer, 40)}' in {line.where}; give all its lines the same"
                )


def _problems(lines: Sequence[_Line]) -> dict[str, Problem]:
    """The lines of one model, by problem."""
    lacking = [line for line in lines if line.response.confidence is None]
    if lacking and len(lacking) < len(lines):
        raise MismatchError(
            f"{len(lacking)} of {len(lines)} responses of one model have no confidence, first {lacking[0].where}; give"
            " all of them one, or none"
        )
    grouped: dict[str, list[_Line]] = {}
    for line in lines:
        first = grouped.setdefault(line.problem, [line])[0]
        if line is first:
            continue
        for key in ("level", "ood"):
            if getattr(line, key) != getattr(first, key):
                raise MismatchError(
                    f"problem '{shown(line.problem)}' has {key} {getattr(first, key)} in {first.where}, but "
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
            name,
            found[0].level,
            found[0].ood,
            tuple(line.response for line in found if not line.greedy),
            next((line.response for line in found if line.greedy), None),
        )
        for name, found in grouped.items()
    }


def _lines(path: Path, cut: bool) -> list[_Line]:
    try:
        plain_size(path)
        with path.open("rb") as file:
            lines = [(f"{shown(path)}, line {n}", content) for n, content in enumerate(file, 1) if content.strip()]
            found = [_line(content, where, cut) for where, content in lines]
    except OSError as error:
        raise CheckpointError(f"the samples {shown(path)} cannot be read: {error.strerror}") from error
    if not found:
        raise CheckpointError(f"the samples {shown(path)} are empty; write one JSON object per line")
    return found


def _line(content: bytes, where: str, cut: bool) -> _Line:
    try:
        line = parse_json(content, without_duplicates)
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {shown(error, 200)}; write one object per line") from error
    if not isinstance(line, dict):
        raise CheckpointError(f'{where}: not an object; write {{"problem": ..., "response": ..., "correct": ...}}')
    for key in line:
        if meant := _misspelt(key):
            raise CheckpointError(
                f"{where}: the key '{shown(key)}' looks like '{meant}'; correct it, or choose a less similar name"
            )

    def value(key: str, kind: type, default: Any = None) -> Any:
        if line.get(key) is None and (key not in line or key in ("model", "level")):
            return default
        if type(line[key]) is not kind:
            what = {bool: "true or false", int: "an integer", str: "a string"}[kind]
            raise CheckpointError(f"{where}: {key} is {shown(repr(line[key]), 60)}; it must be {what}")
        return line[key]

    problem, response = value("problem", str), value("response", str)
    for key, found in (("problem", problem), ("response", response)):
        if found is None:
            raise CheckpointError(f"{where}: {key} is missing; each line needs a problem and a response")
    correct = value("correct", bool)
    if correct is None:
        answer = line.get("answer")
        number = not isinstance(answer, bool) and isinstance(answer, int | float) and -math.inf < answer < math.inf
        if not (number or isinstance(answer, str)):
            raise CheckpointError(
                f'{where}: no verdict; give "correct", true or false, or "answer", a string or a number'
            )
        from .answers import is_correct

        correct = is_correct(response, str(answer), cut=cut)
    return _Line(
        where,
        problem,
        value("model", str),
        Response(response, correct, _confidence(line, where)),
        value("greedy", bool, False),
        value("level", int),
        value("ood", bool, False),
        None if line.get("answer") is None else str(line["answer"]),
    )


def _confidence(line: Mapping[str, Any], where: str) -> float | None:
    value = line.get("confidence")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointError(
            f"{where}: confidence is {shown(repr(value), 60)}; it must be a number from 0 to 1 (80 % is 0.8)"
        )
    return float(value)


@lru_cache(maxsize=1024)
def _misspelt(key: str) -> str | None:
    """The known key that an unknown one may be a misspelling of; names of several words are left alone."""
    if key in KEYS or "_" in key:
        return None
    return next(iter(get_close_matches(key.lower(), KEYS, n=1, cutoff=0.66)), None)
