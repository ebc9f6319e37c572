"""Run rounds of training (the user's commands) and merging; resumable at every step (IMM)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.open_checkpoint import open_checkpoint
from ..common.json_files import is_utf8, parse_json, read_small
from ..common.messages import shown
from ..engine.merge import merged
from ..engine.report import MergeReport
from ..errors import CheckpointError, MergeError, OutputError
from ..options.options import MERGE_DEFAULTS
from ..options.recipe import RECIPE_FILE, REPORT_FILE
from ..output import direct_io
from ..output.paths import expanded, locked
from ..output.write_errors import output_errors
from ..schedules import parse_schedule
from .commands import Echo, filled, run_command
from .early_checks import check_options
from .next_anchor import NextAnchor
from .state import (
    EVALUATE_MERGED,
    LOCK,
    MERGE,
    Settings,
    State,
    alphas_of,
    anchor_decay,
    begin_or_resume,
    check_commands,
    load,
    refuse_others,
    save,
    step_of,
    with_step,
)

Tell = Callable[[str], None]
BASELINE = "baseline"  # the same rounds without merges
_BUSY = "is in use: a loop runs there, or a command that it started still does; wait for it, or end it"


class _Loop:
    """A loop in progress: its folder, its state, and its output callbacks."""

    def __init__(self, folder: Path, held: int | None, state: State, echo: Echo | None, tell: Tell | None) -> None:
        self.folder, self.held, self.state, self.echo = folder, held, state, echo
        self.tell: Tell = tell or (lambda _: None)
        self.settings = state.settings

    def has(self, step: str) -> bool:
        """Whether a step is done."""
        return step in self.state.done

    def finish(self, step: str, **changes: Any) -> None:
        """Record on disk that a step is done."""
        self.state = with_step(self.state, step, **changes)
        save(self.state, self.folder)

    def place(self, number: int, name: str = "", chain: str = "") -> Path:
        """Return the folder of a round, or a path in it."""
        folder = self.folder / chain / f"round-{number}"
        return folder / name if name else folder

    def start(self, number: int) -> str:
        """Return the model that a round starts from."""
        return str(self.place(number - 1, "merged")) if number else self.settings.base

    def anchor(self, number: int) -> str:
        """Return the model that a round is pulled back to."""
        kept = anchor_decay(self.settings.anchor)
        if kept == 1 or number == 0:
            return self.settings.base
        return self.start(number) if kept == 0 else str(self.place(number, "anchor"))


def run_loop(settings: Settings, run: str | Path, *, echo: Echo | None = None, tell: Tell | None = None) -> State:
    """Run or resume a loop to its end: generate, train, merge and evaluate, round after round.

        tuned_t  = start_t + DARE(sft_t - start_t)                            start_0 = base, start_t+1 = merged_t
        merged_t = alpha_t * anchor_t + (1 - alpha_t) * tuned_t               (Eq. 6, with anchor_t = base)

    The anchor is the base in every round (the paper), `previous` (start_t), or `ema:d`: anchor_t+1 = d * anchor_t +
    (1 - d) * merged_t. Finished steps are recorded in RUN/loop.json; called again with the same settings, the loop
    resumes at the first unfinished step. With a gate, a round is accepted if its metric is at most `tolerance` below
    that of the last accepted model (prefix the name with - if less is better); else it is merged again with each alpha
    of `retry`, and the loop stops if none is accepted. `echo` receives the commands' output, `tell` a line per step.
    Returns the final state. Raises CommandError if a command fails, and whatever merges raise.
    """
    folder = expanded(run)
    if settings.base.startswith("~"):  # commands get it quoted
        settings = replace(settings, base=str(Path(settings.base).expanduser()))
    if not is_utf8(str(folder)):
        raise OutputError(f"the path {shown(folder)} is not valid UTF-8; give another folder")
    # Refuse now, not after hours of training.
    if load(folder) is None:
        check_commands(settings)
    _check_merges(settings)
    with output_errors(folder):
        direct_io.make_folder(folder)
        refuse_others(folder)
        (folder / LOCK).touch()
        with locked(folder / LOCK, _BUSY) as held:
            loop = _Loop(folder, held, begin_or_resume(folder, settings), echo, tell)
            if held is None:
                loop.tell(
                    f"note: the filesystem of {shown(folder)} has no locks: make sure that no other loop runs there"
                )
            _run_steps(loop)
            return loop.state


def _run_steps(loop: _Loop) -> None:
    """Run the remaining steps."""
    if loop.settings.evaluate is not None and not loop.has("base/evaluate"):
        _evaluate(loop, "base/evaluate", "base", loop.settings.base, 0, loop.folder / "base.json")
    for number in range(loop.settings.rounds):
        _round(loop, number)
        if loop.settings.baseline:
            _baseline_round(loop, number)
        if loop.has(f"{number}/stop"):  # keep the round before: it has the last accepted model
            return
        if loop.settings.keep_rounds is not None and not loop.has(f"{number}/remove"):
            _remove(loop, number - loop.settings.keep_rounds)
            loop.finish(f"{number}/remove")


def _round(loop: _Loop, number: int) -> None:
    """Run the unfinished steps of a round: generate, train, merge, evaluate; with a gate, until a merge is accepted."""
    settings = loop.settings
    if loop.has(f"{number}/accept") or loop.has(f"{number}/stop"):
        return
    _train(loop, number, loop.start(number), "")
    if settings.evaluate is not None and not loop.has(f"{number}/evaluate sft"):
        place = loop.place(number, "sft.json")
        _evaluate(loop, f"{number}/evaluate sft", f"{number}/sft", str(loop.place(number, "sft")), number, place)
    refusal = ""
    for alpha in alphas_of(settings, number):
        if not loop.has(step_of(number, MERGE, alpha)):
            _merge(loop, number, alpha)
            loop.finish(step_of(number, MERGE, alpha), alphas={**loop.state.alphas, str(number): alpha})
        model, step = loop.place(number, "merged"), step_of(number, EVALUATE_MERGED, alpha)
        if settings.evaluate is not None and not loop.has(step):
            _evaluate(loop, step, f"{number}/merged", str(model), number, loop.place(number, "merged.json"))
        refusal = _gate_refusal(loop.state, number)
        if not refusal:
            loop.finish(f"{number}/accept", model=str(model))
            return
        loop.tell(f"round {number}: not accepted with alpha {alpha:g}: {refusal}")
    loop.finish(
        f"{number}/stop",
        stopped=f"round {number} was not accepted: {refusal}; the loop ends with the model before it",
    )
    following = loop.place(number + 1, "anchor")
    shutil.rmtree(following, ignore_errors=True)  # of the merge that was not accepted
    with suppress(OSError):
        following.parent.rmdir()


def _baseline_round(loop: _Loop, number: int) -> None:
    """Run a round of the baseline, which has no merges: it starts from the sft of the round before."""
    if number == 0:  # the same as the first round of the loop
        return
    start = loop.place(0, "sft") if number == 1 else loop.place(number - 1, "sft", BASELINE)
    _train(loop, number, str(start), BASELINE)
    step, sft = f"{number}/evaluate {BASELINE}", loop.place(number, "sft", BASELINE)
    if loop.settings.evaluate is not None and not loop.has(step):
        _evaluate(loop, step, f"{number}/{BASELINE}", str(sft), number, loop.place(number, "sft.json", BASELINE))


def _train(loop: _Loop, number: int, start: str, chain: str) -> None:
    """Generate data and train, starting from a model."""
    settings, of = loop.settings, f" {chain}" if chain else ""
    data, sft = loop.place(number, "data", chain), loop.place(number, "sft", chain)
    direct_io.make_folder(loop.place(number, chain=chain))
    values = {"model": start, "round": str(number), "base": settings.base}
    if settings.generate is not None and not loop.has(f"{number}/generate{of}"):
        _command(loop, settings.generate, {**values, "output": str(data)}, f"generate{of}", number, data)
        loop.finish(f"{number}/generate{of}")
    if not loop.has(f"{number}/train{of}"):
        _command(loop, settings.train, {**values, "output": str(sft), "data": str(data)}, f"train{of}", number, sft)
        try:
            open_checkpoint(sft, "sft", leave_out=settings.options.get("leave_out", ()))
        except CheckpointError as error:
            raise CheckpointError(f"the train command of round {number} ended with status 0, but {error}") from error
        loop.finish(f"{number}/train{of}")


def _check_merges(settings: Settings) -> None:
    """Raise MergeError for a base or merge options that the merges would refuse after training."""
    drop = parse_schedule(settings.drop, settings.rounds)
    points = [
        {"alpha": alpha, "drop": drop(number)}
        for number in range(settings.rounds)
        for alpha in alphas_of(settings, number)
    ]
    check_options(settings.base, settings.options, points=points)


def _command(loop: _Loop, template: str, values: Mapping[str, str], what: str, number: int, place: Path) -> None:
    """Run one of the user's commands; its log goes next to its output."""
    command = filled(template, values)
    loop.tell(f"round {number}: {what}: {command}")
    kind, _, chain = what.partition(" ")
    name = f"the {kind} command of round {number}{f' ({chain})' if chain else ''}"
    log = place.with_name(f"{kind}.log")
    run_command(name, command, log, held=loop.held, echo=loop.echo)


def _anchor_merge(loop: _Loop, number: int) -> dict[str, Any]:
    """Return the arguments of the merge that makes a round's anchor, which moves."""
    kept = anchor_decay(loop.settings.anchor)
    return {
        **MERGE_DEFAULTS,
        "base": loop.anchor(number - 1),
        "sft": loop.start(number),
        "out": loop.place(number, "anchor"),
        "alpha": kept,
        "drop": 0,
        "iteration": number,
        "overwrite": True,
        "vocab": loop.settings.options.get("vocab", "strict"),
        "dtype": "float32",  # a round may move it by less than the resolution of 16-bit floats
    }


def _merge(loop: _Loop, number: int, alpha: float) -> None:
    """Merge a round; first update a moving anchor, if the round before has not, and then begin the next."""
    settings = loop.settings
    kept = anchor_decay(settings.anchor)
    moves = kept not in (0, 1)
    if number and moves:
        before, result = loop.anchor(number - 1), loop.start(number)
        loop.tell(f"round {number}: anchor: {kept:g} x {before} + {1 - kept:g} x {result}")
        merged(_anchor_merge(loop, number))
    anchor, start = loop.anchor(number), loop.start(number)
    drop = parse_schedule(settings.drop, settings.rounds)(number)
    loop.tell(f"round {number}: merge: alpha {alpha:g}, drop {drop:g}, anchor {anchor}")
    dtype = settings.options.get("dtype", "base")
    if dtype == "base" and anchor not in (settings.base, start):
        dtype = "start"  # the previous merged model, which has the base's dtypes
    given = {
        **MERGE_DEFAULTS,
        **settings.options,
        "base": anchor,
        "sft": loop.place(number, "sft"),
        "out": loop.place(number, "merged"),
        "start": start if start != anchor else None,
        "iteration": number,
        "alpha": alpha,
        "drop": drop,
        "dtype": dtype,
        "overwrite": True,
    }
    following = None
    if moves and number + 1 < settings.rounds:
        with suppress(MergeError):  # its own merge says so
            following = NextAnchor(_anchor_merge(loop, number + 1), like=start)
    try:
        report = merged(given, None if following is None else following.add)
        assert isinstance(report, MergeReport)
        for note in report.notes:
            loop.tell(note)
        for name in (RECIPE_FILE, REPORT_FILE):  # they outlive the model
            direct_io.write_file(loop.place(number, name), (loop.place(number, "merged") / name).read_bytes())
        if following is not None:
            following.hand_over(lambda: merged(_anchor_merge(loop, number + 1)))
    finally:
        if following is not None:
            following.discard()


def _evaluate(loop: _Loop, step: str, key: str, model: str, number: int, path: Path) -> None:
    """Evaluate a model and record the numbers that the command writes; nested ones under dotted names."""
    settings = loop.settings
    assert settings.evaluate is not None
    path.unlink(missing_ok=True)
    command = filled(
        settings.evaluate, {"model": model, "json": str(path), "round": str(number), "base": settings.base}
    )
    loop.tell(f"round {number}: evaluate: {command}")
    log = path.with_name(f"evaluate-{path.stem}.log")
    run_command(f"the evaluate command of {key}", command, log, held=loop.held, echo=loop.echo)
    metrics = _metrics(path)
    wanted = (settings.gate or "").removeprefix("-")
    if wanted and wanted not in metrics:
        raise CheckpointError(
            f"{shown(path)} has no '{shown(wanted)}', which the gate asks for, but {', '.join(map(shown, metrics))}"
        )
    loop.finish(step, metrics={**loop.state.metrics, key: metrics})


def _metrics(path: Path) -> dict[str, float]:
    try:
        content = parse_json(read_small(path))
    except OSError as error:
        raise CheckpointError(
            f"the evaluate command ended with status 0, but {shown(path)} cannot be read: {error.strerror}; it must"
            " write its numbers to {json}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{shown(path)}, which the evaluate command wrote, is not JSON: {error}") from error
    found: dict[str, float] = {}

    def collect(value: Any, place: str) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                collect(each, f"{place}.{key}" if place else str(key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            try:
                found[place] = float(value)
            except OverflowError:
                found[place] = math.inf

    collect(content, "")
    if not isinstance(content, dict) or not found:
        raise CheckpointError(
            f"{shown(path)}, which the evaluate command wrote, is not a JSON object with numbers in it"
        )
    wrong = next((key for key, value in found.items() if not math.isfinite(value)), None)
    if wrong is not None:
        raise CheckpointError(f"{shown(path)}: '{shown(wrong)}' is {found[wrong]}, which cannot be compared")
    return found


def _gate_refusal(state: State, number: int) -> str:
    """Return why the gate refuses a round; "" if it accepts."""
    gate = state.settings.gate
    if gate is None:
        return ""
    name = gate.removeprefix("-")
    sign = -1 if gate.startswith("-") else 1
    last = "base" if number == 0 else f"{number - 1}/merged"
    before, now = state.metrics[last][name], state.metrics[f"{number}/merged"][name]
    if sign * (now - before) >= -state.settings.tolerance:
        return ""
    return f"{shown(name)} is {now:g} after {before:g}"


def _remove(loop: _Loop, last: int) -> None:
    """Remove the models of all rounds up to `last`; recipes, metrics and logs stay."""
    for number in range(last + 1):
        for chain in ("", BASELINE):
            for path in (loop.place(number, name, chain) for name in ("data", "sft", "merged", "anchor")):
                if path.is_symlink() or path.exists():
                    loop.tell(f"removing {path}")
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
