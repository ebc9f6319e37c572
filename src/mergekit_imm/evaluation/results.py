"""What evaluations measured of merged models: JSON files of numbers, and the folders of loops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from ..common.display import Displayed, Summary, points
from ..common.json_files import numbers_in, parse_json, read_small
from ..common.messages import first_few, shown
from ..errors import ArgumentError, CheckpointError
from ..loop.metrics import rows
from ..loop.state import FORMAT, STATE, load, without_sign
from ..options.recipe import CARD_FILE, RECIPE_FILE, REPORT_FILE, read_recipe
from ..schedules import parse_schedule
from .pareto import pareto_front

METRICS = "metrics.json"  # in the folder of a merged model


@dataclass(frozen=True)
class Result:
    """The numbers of a model; alpha and drop if it is a merge. Results of one `series` differ in alpha alone."""

    name: str
    place: str  # the file that holds them
    metrics: Mapping[str, float]
    alpha: float | None = None
    drop: float | None = None
    series: str = ""


@dataclass(frozen=True, repr=False)
class Tradeoff(Displayed):
    """Results by two metrics, each with a leading - if less is better; `front`: the indices of those on it."""

    inside: str
    outside: str
    results: tuple[Result, ...]
    front: tuple[int, ...]

    def point(self, result: Result) -> tuple[float, float]:
        """Return both metrics of a result, as they were measured."""
        return tuple(result.metrics[without_sign(name)[0]] for name in (self.inside, self.outside))  # type: ignore[return-value]

    def _summary(self) -> Summary:
        names = [shown(without_sign(name)[0], 40) for name in (self.inside, self.outside)]
        best = first_few([shown(self.results[i].name, 40) for i in self.front], ", ")
        rows = [
            [shown(each.name, 40), *(f"{value:.4g}" for value in self.point(each)), "front" if i in self.front else ""]
            for i, each in enumerate(self.results)
        ]
        line = f"{len(self.results)} results by {names[0]} and {names[1]}; on the front: {best}"
        return Summary(line, (), ("model", *names, ""), rows)

    def _picture(self) -> str:
        signs = [without_sign(name)[1] for name in (self.inside, self.outside)]
        places = [(signs[0] * x, signs[1] * y) for x, y in map(self.point, self.results)]
        labels = [each.name if each.alpha is None else f"alpha {each.alpha:g}" for each in self.results]
        more = [
            f"{'more' if sign > 0 else 'less'} {shown(without_sign(name)[0], 40)}"
            for sign, name in zip(signs, (self.inside, self.outside), strict=True)
        ]
        title = f"right: {more[0]}; up: {more[1]}"
        return points(places, labels, self.front, title) if 1 < len(places) <= 40 else ""


def read_results(places: Sequence[str | Path]) -> list[Result]:
    """Return the results in files and folders, series by series, by alpha; models without alpha come first.

    A place is the folder of a loop; a JSON file of numbers, in the folder of a model or beside it under its name
    (out-0.3/metrics.json, out-0.3.json); or the folder of a model, for the file of these two that exists, first that
    beside it. Alpha and drop are those of the model's recipe. Raises CheckpointError for what cannot be read, and for
    numbers of an input that the merge took along.
    """
    found: list[Result] = []
    several = len(places) > 1
    for place in map(Path, places):
        folder = place.parent if place.name == STATE and place.is_file() and place.parent != Path() else place
        if (folder / STATE).is_file():
            found += _of_loop(folder, f"{folder.name or folder}: " if several else "")
        else:
            found.append(_of_model(place))
    drops = {each.drop for each in found if each.drop is not None and not each.series}
    if len(drops) > 1:
        found = [
            each if each.series or each.drop is None else replace(each, series=f"drop {each.drop:g}") for each in found
        ]
    order = list(dict.fromkeys(each.series for each in found))
    return sorted(found, key=lambda each: (order.index(each.series), each.alpha is not None, each.alpha or 0.0))


def tradeoff(results: Sequence[Result], inside: str, outside: str) -> Tradeoff:
    """Return results with their Pareto front in two metrics. Raises CheckpointError for one that lacks a metric."""
    names = [without_sign(name) for name in (inside, outside)]
    if not all(name for name, _ in names) or names[0][0] == names[1][0]:
        raise ArgumentError("give two different metrics, each with a leading - if less is better")
    points = []
    for each in results:
        for name, _ in names:
            if name not in each.metrics:
                near = get_close_matches(name, each.metrics, n=1)
                hint = f"did you mean '{shown(near[0])}'?" if near else f"it has {', '.join(map(shown, each.metrics))}"
                raise CheckpointError(
                    f"{shown(each.place)} has no number '{shown(name)}' of {shown(each.name)}; {hint}"
                )
            if not math.isfinite(each.metrics[name]):
                raise CheckpointError(
                    f"{shown(each.place)}: '{shown(name)}' is {each.metrics[name]}, which cannot be compared; evaluate"
                    " it again, or leave it out"
                )
        points.append(tuple(sign * each.metrics[name] for name, sign in names))
    return Tradeoff(inside, outside, tuple(results), tuple(pareto_front(points)))  # type: ignore[arg-type]


def _of_loop(folder: Path, prefix: str) -> list[Result]:
    """Return the results of a loop: each round is a series."""
    state = load(folder)
    assert state is not None
    drop = parse_schedule(state.settings.drop, state.settings.rounds)
    found = []
    for row in rows(state):
        number, alpha = row["round"], row["alpha"]
        series = "" if number is None else f"{prefix}round {number}"
        merged = None if alpha is None else drop(number)
        found.append(Result(prefix + row["title"], str(folder / STATE), row["metrics"], alpha, merged, series))
    if not found:
        raise CheckpointError(f"{shown(folder / STATE)} has no numbers; run the loop with --evaluate")
    return found


def _of_model(place: Path) -> Result:
    """Return the result in a file, or of a model's folder."""
    if place.is_dir():
        files = [place.parent / f"{place.resolve().name}.json", place / METRICS]
        file = next((each for each in files if each.is_file()), None)
        if file is None:
            raise CheckpointError(
                f"{shown(place)} has no {METRICS}, and no {shown(files[0].name)} beside it; give the file that holds"
                " its numbers"
            )
    else:
        file = place
    if file.name in (RECIPE_FILE, REPORT_FILE):
        raise CheckpointError(f"{shown(file)} is no evaluation; leave it out, or give the folder of the loop or model")
    try:
        content = parse_json(read_small(file))
    except OSError as error:
        raise CheckpointError(f"{shown(file)} cannot be read: {error.strerror}; give a JSON file of numbers") from error
    except ValueError as error:
        raise CheckpointError(f"{shown(file)} is not JSON: {error}; give a JSON file of numbers") from error
    metrics = numbers_in(content)
    if not isinstance(content, dict) or not metrics or content.get("format") == FORMAT:
        raise CheckpointError(f"{shown(file)} is not a JSON object with numbers in it; give what an evaluation wrote")
    around, beside = file.resolve().parent, file.with_suffix("")
    if file.suffix == ".json" and beside.is_dir():
        model: Path | None = beside
    else:  # a round of a loop has a recipe, but is no model
        model = around if (around / RECIPE_FILE).exists() and (around / CARD_FILE).exists() else None
    name = around.name if file.name == METRICS or model is around else file.stem
    recipe = None if model is None else read_recipe(model)
    if recipe is not None and model is around:
        _refuse_copy(file, around / RECIPE_FILE, [Path(each["path"]) for each in recipe["inputs"].values()])
    parameters = {} if recipe is None else recipe["parameters"]
    return Result(name, str(file), metrics, parameters.get("alpha"), parameters.get("drop"))


def _refuse_copy(file: Path, recipe: Path, inputs: Sequence[Path]) -> None:
    """Raise CheckpointError for a file of an input, which a merge copies like any other file beside the weights."""
    for source in (each / file.name for each in inputs):
        # An evaluation of the merged model is later than the merge, even if it finds the same numbers.
        if (
            source.is_file()
            and file.stat().st_mtime_ns <= recipe.stat().st_mtime_ns
            and file.read_bytes() == source.read_bytes()
        ):
            raise CheckpointError(
                f"{shown(file)} is a copy of {shown(source)}, which the merge took along: it says nothing of the merged"
                " model; evaluate that, and remove this file"
            )
