"""The state of a loop on disk: settings, finished steps, metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..common.display import Displayed, Summary
from ..common.json_files import is_utf8, parse_json, read_small
from ..common.messages import first_few, shown
from ..errors import ArgumentError, CheckpointError, OutputError
from ..options.options import LOOP_OPTIONS, MERGE_DEFAULTS, MergeOptions, check_keywords
from ..options.recipe import differences, to_json
from ..output import direct_io
from ..schedules import parse_schedule
from .choice import Choice, parse_choice
from .commands import check_placeholders, placeholders

STATE = "loop.json"
LOCK = "lock"  # held while a loop, or a command it started, runs
FORMAT, VERSION = "mergekit_imm loop", 1
GENERATE = ("model", "output", "round", "base")
TRAIN = ("model", "output", "data", "round", "base")
EVALUATE = ("model", "json", "round", "base")
MERGE, EVALUATE_MERGED = "merge", "evaluate merged"  # steps repeated for each alpha tried
COMMANDS = ("evaluate", "generate", "train")  # in the order of their first steps


@dataclass(frozen=True)
class Settings:
    """Settings of a loop. Rounds count from 0; `alpha` and `drop` are schedules, see `parse_schedule`.

    With `alpha` "choose:0.2,0.4" or "choose:auto" each round keeps the alpha with the best `metric`. `options` are
    further keyword arguments of `merge_checkpoints`.
    """

    base: str
    train: str  # commands, with placeholders
    rounds: int = 3
    generate: str | None = None
    evaluate: str | None = None
    alpha: str = "0.5"
    metric: str | None = None  # chooses alpha; with a leading - less is better, here and for the gate
    drop: str = "0.2"
    anchor: str = "base"  # what a merge pulls towards: base, previous, ema:DECAY
    keep_rounds: int | None = None
    gate: str | None = None
    tolerance: float = 0.0
    retry: tuple[float, ...] = ()  # alphas to try if the gate refuses a round
    baseline: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # for every merge: seed, importance, keep, …

    def __post_init__(self) -> None:
        """Raise ArgumentError for invalid settings."""
        if self.rounds < 1:
            raise ArgumentError(f"rounds is {self.rounds!r}; give at least 1")
        check_keywords(self.options, set(MERGE_DEFAULTS) - {"alpha", "drop", "iteration"}, "a loop")
        for number in range(self.rounds):
            for alpha in alphas_of(self, number):
                merge_options(self, number, alpha)
        for alpha in self.retry:
            merge_options(self, 0, alpha)
        anchor_decay(self.anchor)
        for text in (self.base, self.train, self.generate, self.evaluate, self.metric, self.gate):
            if text is not None and not is_utf8(text):
                raise ArgumentError(
                    f"'{shown(text)}' is not valid UTF-8 and cannot be written to {STATE}; rename it, or link to it"
                )
        if "output" not in placeholders(self.train, TRAIN):
            raise ArgumentError("the train command has no {output}; it must say where the trained model goes")
        if self.generate is None and "data" in placeholders(self.train, TRAIN):
            raise ArgumentError("the train command has {data}, but no generate command makes it")
        if self.generate is not None and "output" not in placeholders(self.generate, GENERATE):
            raise ArgumentError("the generate command has no {output}; it must say where the data goes")
        if self.evaluate is not None and not {"model", "json"} <= placeholders(self.evaluate, EVALUATE):
            raise ArgumentError("the evaluate command needs {model} and {json}: what to measure, and where to write it")
        for what in ("gate", "metric"):
            name = getattr(self, what)
            if name is not None and not name.removeprefix("-"):
                raise ArgumentError(f"the {what} is {name!r}; name a number that the evaluate command writes")
            if name is not None and self.evaluate is None:
                raise ArgumentError(f"the {what} is {name!r}, but no evaluate command measures it")
        if self.retry and self.gate is None:
            raise ArgumentError("retry is given, but no gate; give a gate, or leave retry out")
        self._check_choice()
        if not 0 <= self.tolerance < float("inf"):
            raise ArgumentError(f"tolerance is {self.tolerance!r}; it must be a number, 0 or more")
        if self.keep_rounds is not None and self.keep_rounds < 1:
            raise ArgumentError(f"keep_rounds is {self.keep_rounds!r}; give at least 1: the last round is always kept")

    def _check_choice(self) -> None:
        choice = parse_choice(self.alpha)
        if choice is None and self.metric is not None:
            raise ArgumentError(
                f"the metric is {self.metric!r}, but alpha is {self.alpha!r}, which leaves no choice; write"
                " choose:0.2,0.4,0.6,0.8 or choose:auto, or leave metric out"
            )
        if choice is not None and self.metric is None:
            raise ArgumentError(
                f"alpha is {self.alpha!r}, but no metric says which is best; name a number that the evaluate command"
                " writes, with a leading - if less is better"
            )
        if choice is not None and self.retry:
            raise ArgumentError(
                f"retry is given, but alpha is {self.alpha!r}, which tries several already; leave retry out"
            )


def merge_options(settings: Settings, number: int, alpha: float) -> MergeOptions:
    """Return the merge options of a round. Raises ArgumentError."""
    drop = parse_schedule(settings.drop, settings.rounds)(number)
    return MergeOptions(**settings.options, alpha=alpha, drop=drop, iteration=number)


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return settings as flat plain data, with every option of the imm-loop command."""
    values = {each.name: getattr(settings, each.name) for each in fields(settings) if each.name != "options"}
    return values | {name: MERGE_DEFAULTS[name] for name in LOOP_OPTIONS} | dict(settings.options)


def from_dict(values: Mapping[str, Any]) -> Settings:
    """Return settings from the data of `to_dict`, or of a file; lists become tuples, unknown keys are ignored."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    own = {each.name for each in fields(Settings)} - {"options"}
    options = {key: given[key] for key in MERGE_DEFAULTS if key in given and key not in own}
    used = {key: value for key, value in options.items() if value != MERGE_DEFAULTS[key]}
    known: dict[str, Any] = {key: given[key] for key in own & set(given)}
    return Settings(**known, options=used)


def check_commands(settings: Settings, found: State | None) -> None:
    """Raise ArgumentError for an unknown placeholder in a command, unless the loop that was found has this command."""
    for what, names in (("generate", GENERATE), ("train", TRAIN), ("evaluate", EVALUATE)):
        command = getattr(settings, what)
        if command is not None and (found is None or command != getattr(found.settings, what)):
            check_placeholders(f"the {what} command", command, names, {*GENERATE, *TRAIN, *EVALUATE})


def alphas_of(settings: Settings, number: int) -> list[float]:
    """Return the alphas that a round may be merged with: all to choose from, or in turn until the gate accepts one."""
    choice = parse_choice(settings.alpha)
    if choice is not None:
        return list(choice.alphas)
    first = parse_schedule(settings.alpha, settings.rounds)(number)
    return [first, *(alpha for alpha in settings.retry if alpha > first)]


def step_of(number: int, what: str, alpha: float) -> str:
    """Return the name of a step for one alpha; different alphas have different names."""
    return f"{number}/{what} {alpha!r}"


def candidate(number: int, alpha: float) -> str:
    """Return under which name the metrics of a round's candidate are recorded; its folder has the last part."""
    return f"{number}/alpha-{alpha!r}"


def measured(state: State, number: int) -> dict[float, float]:
    """Return what the candidates of a round measured, by alpha; more is better."""
    metric = state.settings.metric
    if metric is None:
        return {}
    name, sign = without_sign(metric)
    found = {alpha: state.metrics.get(candidate(number, alpha)) for alpha in alphas_of(state.settings, number)}
    return {alpha: sign * metrics[name] for alpha, metrics in found.items() if metrics is not None}


def without_sign(metric: str) -> tuple[str, int]:
    """Return the name of a metric, and -1 if less is better, else 1.

    >>> without_sign("-loss")
    ('loss', -1)
    """
    return metric.removeprefix("-"), -1 if metric.startswith("-") else 1


def anchor_decay(anchor: str) -> float:
    """Return the share of an anchor kept from round to round: 1 for base, 0 for previous, 0.9 for ema:0.9."""
    if anchor in ("base", "previous"):
        return {"base": 1.0, "previous": 0.0}[anchor]
    kind, _, text = anchor.partition(":")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if kind != "ema" or not 0 <= value <= 1:
        raise ArgumentError(f"anchor is {anchor!r}; it must be base, previous, or ema:DECAY with a decay from 0 to 1")
    return value


@dataclass(frozen=True, repr=False)
class State(Displayed):
    """Progress of a loop. Steps are named "ROUND/WHAT"; `model` is the last accepted one."""

    settings: Settings
    model: str
    done: tuple[str, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by model
    alphas: Mapping[str, float] = field(default_factory=dict)  # round -> the alpha accepted, or tried last
    stopped: str = ""  # why the loop stopped early

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        rest = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"format": FORMAT, "version": VERSION, **rest, "settings": to_dict(self.settings)}

    def _summary(self) -> Summary:
        alphas = ", ".join(f"round {number}: alpha {alpha:g}" for number, alpha in self.alphas.items())
        rounds = f"{len(self.alphas)} of {self.settings.rounds} rounds merged"
        names = list(dict.fromkeys(name for each in self.metrics.values() for name in each))[:6]
        rows = [
            [shown(model, 40), *(f"{each[name]:.4g}" if name in each else "" for name in names)]
            for model, each in self.metrics.items()
        ]
        more = [*([alphas] if alphas else []), *([f"stopped: {self.stopped}"] if self.stopped else [])]
        return Summary(f"{rounds}; the model is {shown(self.model)}", more, ("model", *map(shown, names)), rows)


def with_steps(state: State, steps: Iterable[str], **changes: Any) -> State:
    """Return the state with more steps done."""
    return replace(state, done=(*state.done, *steps), **changes)


def save(state: State, folder: Path) -> None:
    """Write a state atomically."""
    direct_io.replace_file(folder / STATE, to_json(state.to_dict()))


def load(folder: Path) -> State | None:
    """Return the state in a folder, or None if it has none. Raises CheckpointError if it is damaged."""
    path = folder / STATE
    try:
        if not path.exists():
            return None
        content = parse_json(read_small(path))
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it has format {content['format']!r}, version {content['version']!r}")
        metrics = {name: {key: float(v) for key, v in each.items()} for name, each in content["metrics"].items()}
        settings = from_dict(content["settings"])
        return State(
            settings,
            model=str(content["model"]),
            done=_renamed(settings, content["done"]),
            metrics=metrics,
            alphas=dict(content["alphas"]),
            stopped=str(content["stopped"]),
        )
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}; make it readable") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{shown(path)} is damaged: {shown(error, 200)}; restore it, or give another folder"
        ) from error


def _renamed(settings: Settings, done: Iterable[str]) -> tuple[str, ...]:
    """Return the finished steps under their present names; the first version wrote alphas with six digits.

    If several alphas shared a name, only the first was merged; the others count as not done.
    """
    names = {step: step for step in done}
    for number in range(settings.rounds):
        for what in (MERGE, EVALUATE_MERGED):
            free = set(names)
            for alpha in alphas_of(settings, number):
                step, old = step_of(number, what, alpha), f"{number}/{what} {alpha:g}"
                if step not in free and old in free:
                    names[old] = step
                free -= {step} if step in free else {old}
    return tuple(names.values())


def refuse_others(folder: Path) -> None:
    """Raise OutputError for a folder that is not empty and holds no loop."""
    names = {each.name for each in folder.iterdir()}
    if STATE not in names and names - {LOCK, STATE + ".new"}:
        raise OutputError(f"{shown(folder)} exists, is not empty, and has no {STATE}; give another folder")


def may_change(done: Iterable[str]) -> set[str]:
    """Return the commands that no finished step has run or done without: a loop with these steps may get others.

    >>> sorted(may_change(["base/evaluate"])), may_change(["0/generate"]), may_change(["0/train"])
    (['generate', 'train'], {'train'}, set())
    """
    kinds = {step.partition("/")[2].partition(" ")[0] for step in done}
    last = max((number for number, what in enumerate(COMMANDS) if what in kinds), default=-1)
    return set(COMMANDS[last + 1 :])


def begin_or_resume(folder: Path, settings: Settings, tell: Callable[[str], None] | None = None) -> State:
    """Return the state in the folder, or create a new one.

    Raises OutputError if the folder holds a loop with other settings that a finished step depends on. While no step is
    done, all may change; then the commands of `may_change`. `tell` receives a note of such changes. `rounds` may grow,
    if alpha and drop of the earlier rounds stay the same.
    """
    found = load(folder)
    if found is None:
        state = State(settings, settings.base)
        save(state, folder)
        return state
    if found.done:
        free = may_change(found.done)
        changes = _changes(found.settings, settings, free)
        if changes:
            raise OutputError(
                f"{shown(folder)} holds another loop ({first_few(changes)}); give the settings it was started with, or"
                f" another folder, or delete {shown(folder)} to start over"
            )
        state = replace(found, settings=settings)
    else:
        free = set(to_dict(settings))
        state = State(settings, settings.base)
    old, new = ({k: v for k, v in to_dict(each).items() if k in free} for each in (found.settings, settings))
    accepted = differences(old, new)
    if accepted:
        save(state, folder)
        if tell is not None:
            tell(
                f"note: {shown(folder)} goes on with changed settings ({first_few(accepted)}); what the unfinished"
                " step has written there is kept"
            )
    return state


def _changes(before: Settings, now: Settings, free: Collection[str]) -> list[str]:
    """List in what the settings of a loop and those it is resumed with differ, but for what is free and more rounds."""
    old, new = ({name: value for name, value in to_dict(each).items() if name not in free} for each in (before, now))
    more = now.rounds - before.rounds
    for each in (old, new):
        for name in ("rounds", "alpha", "drop")[: 3 if more > 0 else 1]:  # with more rounds, compared below
            del each[name]
    changes = differences(old, new)
    if more < 0:
        changes.append(f"rounds: {before.rounds}, now {now.rounds}")
    for name in ("alpha", "drop"):
        one, other = (_schedule(getattr(each, name), each.rounds) for each in (before, now))
        if more > 0 and not changes and any(one(t) != other(t) for t in range(before.rounds)):
            changes.append(f"{name} of earlier rounds changes with more rounds")
    return changes


def _schedule(text: str, rounds: int) -> Callable[[int], float | Choice]:
    """Return the value of each round: a number, or what there is to choose from."""
    choice = parse_choice(text)
    return parse_schedule(text, rounds) if choice is None else lambda _: choice
