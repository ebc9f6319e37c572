"""Run rounds of training (the user's commands) and merging; resumable at every step (IMM)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.open_checkpoint import open_checkpoint
from ..common.json_files import is_utf8
from ..common.messages import shown
from ..engine.merge import merged
from ..errors import CheckpointError, MergeError, OutputError
from ..options.options import MERGE_DEFAULTS
from ..options.recipe import RECIPE_FILE, REPORT_FILE
from ..output import direct_io
from ..output.paths import expanded, locked
from ..output.write_errors import lack_of_space, output_errors
from ..schedules import parse_schedule
from .choice import Choice, best_of, next_alphas, parse_choice
from .commands import Echo, filled, run_command
from .early_checks import check_options, output_bytes
from .metrics import gate_refusal, read_metrics
from .next_anchor import NextAnchor
from .progress import Loop, Tell
from .state import (
    EVALUATE_MERGED,
    LOCK,
    MERGE,
    Settings,
    State,
    alphas_of,
    anchor_decay,
    begin_or_resume,
    candidate,
    check_commands,
    load,
    may_change,
    measured,
    refuse_others,
    step_of,
    without_sign,
)

BASELINE = "baseline"  # the same rounds without merges
_BUSY = "is in use: a loop runs there, or a command that it started still does; wait for it, or end it"


def run_loop(settings: Settings, run: str | Path, *, echo: Echo | None = None, tell: Tell | None = None) -> State:
    """Run or resume a loop to its end: generate, train, merge and evaluate, round after round.

        tuned_t  = start_t + DARE(sft_t - start_t)                            start_0 = base, start_t+1 = merged_t
        merged_t = alpha_t * anchor_t + (1 - alpha_t) * tuned_t               (Eq. 6, with anchor_t = base)

    The anchor is the base in every round (the paper), `previous` (start_t), or `ema:d`: anchor_t+1 = d * anchor_t +
    (1 - d) * merged_t. Finished steps are recorded in RUN/loop.json; called again with the same settings, the loop
    resumes at the first unfinished step. If alpha is a choice, a round is merged with each alpha to choose from, and
    the one with the best metric is kept (of equals, the largest alpha). With a gate, a round is accepted if its metric
    is at most `tolerance` below that of the last accepted model; else it is merged again with each alpha of `retry`,
    and the loop stops if none is accepted. Prefix either name with - if less is better. `echo` receives the commands'
    output, `tell` a line per step. Returns the final state. Raises CommandError if a command fails, and whatever merges
    raise.
    """
    folder = expanded(run)
    if settings.base.startswith("~"):  # commands get it quoted
        settings = replace(settings, base=str(Path(settings.base).expanduser()))
    if not is_utf8(str(folder)):
        raise OutputError(f"the path {shown(folder)} is not valid UTF-8; give another folder")
    filled_in = re.search(r"\{(alpha|drop|seed)\}", str(folder))
    if filled_in:
        raise OutputError(f"the path {shown(folder)} has {filled_in[0]}, which merges fill in; give another folder")
    # Refuse now, not after hours of training.
    found = load(folder)
    check_commands(settings, found)
    if found is None or not found.done:
        _check_room(settings, folder)
    _check_merges(settings)
    with output_errors(folder):
        direct_io.make_folder(folder)
        refuse_others(folder)
        (folder / LOCK).touch()
        with locked(folder / LOCK, _BUSY) as held:
            loop = Loop(folder, held, begin_or_resume(folder, settings, tell), echo, tell)
            if held is None:
                loop.tell(
                    f"note: the filesystem of {shown(folder)} has no locks: make sure that no other loop runs there"
                )
            _run_steps(loop)
            return loop.state


def _run_steps(loop: Loop) -> None:
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


def _round(loop: Loop, number: int) -> None:
    """Run the unfinished steps of a round: generate, train, merge, evaluate; with a gate, until a merge is accepted."""
    settings = loop.settings
    if loop.has(f"{number}/accept") or loop.has(f"{number}/stop"):
        return
    if not loop.has(f"{number}/train"):
        _check_room(settings, loop.folder)
    _train(loop, number, loop.start(number), "")
    if settings.evaluate is not None and not loop.has(f"{number}/evaluate sft"):
        place = loop.place(number, "sft.json")
        _evaluate(loop, f"{number}/evaluate sft", f"{number}/sft", str(loop.place(number, "sft")), number, place)
    refusal = ""
    for alpha in _merges(loop, number):
        refusal = gate_refusal(loop.state, number)
        if not refusal:
            loop.finish(f"{number}/accept", model=str(loop.place(number, "merged")))
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


def _merges(loop: Loop, number: int) -> Iterator[float]:
    """Merge and measure a round with each of its alphas in turn, or with the one that is chosen; yield the alpha."""
    choice = parse_choice(loop.settings.alpha)
    if choice is not None:
        yield _choose(loop, number, choice)
        return
    for alpha in alphas_of(loop.settings, number):
        if not loop.has(step_of(number, MERGE, alpha)):
            _merge(loop, number, alpha, "merged")
            loop.finish(step_of(number, MERGE, alpha), alphas={**loop.state.alphas, str(number): alpha})
        step, model = step_of(number, EVALUATE_MERGED, alpha), str(loop.place(number, "merged"))
        if loop.settings.evaluate is not None and not loop.has(step):
            _evaluate(loop, step, f"{number}/merged", model, number, loop.place(number, "merged.json"))
        yield alpha


def _choose(loop: Loop, number: int, choice: Choice) -> float:
    """Merge and measure the candidates of a round, keep the best as its merged model, and return its alpha.

    A candidate that is not the best so far is removed once that is recorded. What is done next follows from what was
    measured, so a killed loop measures nothing again.
    """
    while not loop.has(f"{number}/choose"):
        seen = measured(loop.state, number)
        _remove_candidates(loop, number, set(seen) - {best_of(seen)} if seen else set())
        asked = next_alphas(choice, seen)
        if not asked:
            _record_choice(loop, number, seen)
            break
        lacking = [alpha for alpha in asked if not loop.has(step_of(number, MERGE, alpha))]
        if lacking:
            _merge(loop, number, lacking, "alpha-{alpha}")
            loop.finish(*(step_of(number, MERGE, alpha) for alpha in lacking))
        for alpha in asked:
            key, model = candidate(number, alpha), _candidate_place(loop, number, alpha)
            _evaluate(
                loop,
                step_of(number, EVALUATE_MERGED, alpha),
                key,
                str(model),
                number,
                model.with_name(f"{model.name}.json"),
            )
    alpha = loop.state.alphas[str(number)]
    if not loop.has(f"{number}/keep"):
        _keep(loop, number, alpha)
    return alpha


def _candidate_place(loop: Loop, number: int, alpha: float) -> Path:
    return loop.place(number) / candidate(number, alpha).rpartition("/")[2]


def _record_choice(loop: Loop, number: int, seen: Mapping[float, float]) -> None:
    """Record which candidate of a round is the best; from now on its numbers are those of the merged model."""
    alpha = best_of(seen)
    metrics = loop.state.metrics[candidate(number, alpha)]
    name = without_sign(loop.settings.metric or "")[0]
    loop.tell(f"round {number}: alpha {alpha:g} of {len(seen)} measured, with {shown(name)} {metrics[name]:g}")
    loop.finish(
        f"{number}/choose",
        alphas={**loop.state.alphas, str(number): alpha},
        metrics={**loop.state.metrics, f"{number}/merged": metrics},
    )


def _keep(loop: Loop, number: int, alpha: float) -> None:
    """Put the chosen candidate in the place of the round's merged model."""
    merged, chosen = loop.place(number, "merged"), _candidate_place(loop, number, alpha)
    if not merged.is_dir():  # cut off before
        if not chosen.is_dir():
            raise OutputError(f"{shown(chosen)}, the best of round {number}, is gone; put it back and run again")
        chosen.rename(merged)
        direct_io.sync_folder(merged.parent)
    _copy_records(loop, number)
    direct_io.write_file(loop.place(number, "merged.json"), chosen.with_name(f"{chosen.name}.json").read_bytes())
    loop.finish(f"{number}/keep")


def _remove_candidates(loop: Loop, number: int, alphas: Iterable[float]) -> None:
    for alpha in sorted(alphas):
        place = _candidate_place(loop, number, alpha)
        if place.is_dir():
            loop.tell(f"removing {place}")
            shutil.rmtree(place)


def _copy_records(loop: Loop, number: int) -> None:
    """Copy a round's recipe and report, which outlive its model."""
    for name in (RECIPE_FILE, REPORT_FILE):
        direct_io.write_file(loop.place(number, name), (loop.place(number, "merged") / name).read_bytes())


def _baseline_round(loop: Loop, number: int) -> None:
    """Run a round of the baseline, which has no merges: it starts from the sft of the round before."""
    if number == 0:  # the same as the first round of the loop
        return
    start = loop.place(0, "sft") if number == 1 else loop.place(number - 1, "sft", BASELINE)
    _train(loop, number, str(start), BASELINE)
    step, sft = f"{number}/evaluate {BASELINE}", loop.place(number, "sft", BASELINE)
    if loop.settings.evaluate is not None and not loop.has(step):
        _evaluate(loop, step, f"{number}/{BASELINE}", str(sft), number, loop.place(number, "sft.json", BASELINE))


def _train(loop: Loop, number: int, start: str, chain: str) -> None:
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


def _check_room(settings: Settings, folder: Path) -> None:
    """Raise OutputError if the disk cannot hold the candidates of a round."""
    choice = parse_choice(settings.alpha)
    if choice is None:
        return
    size = output_bytes(settings.base, settings.options)
    lacking = lack_of_space({folder / f"alpha-{alpha}": size for alpha in choice.alphas[: choice.at_once]})
    if lacking:
        fewer = "" if choice.is_search else "; choose among fewer alphas, or by choose:auto, which keeps two at a time"
        raise OutputError(f"the models to choose from: {lacking}{fewer}")


def _command(loop: Loop, template: str, values: Mapping[str, str], what: str, number: int, place: Path) -> None:
    """Run one of the user's commands; its log goes next to its output."""
    command = filled(template, values)
    loop.tell(f"round {number}: {what}: {command}")
    kind, _, chain = what.partition(" ")
    name = f"the {kind} command of round {number}{f' ({chain})' if chain else ''}"
    log = place.with_name(f"{kind}.log")
    run_command(name, command, log, held=loop.held, echo=loop.echo, cure=_cure(loop, kind))


def _cure(loop: Loop, what: str) -> str:
    """Return what helps after a command has failed."""
    if what in may_change(loop.state.done):
        return "correct the command if it is wrong, and run the loop again to resume at this step"
    return "run the loop again, with the same command, to resume at this step"


def _anchor_merge(loop: Loop, number: int) -> dict[str, Any]:
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


def _merge(loop: Loop, number: int, alpha: float | Sequence[float], name: str) -> None:
    """Merge a round; first update a moving anchor, if the round before has not, and then begin the next.

    Several alphas are merged from one reading. The next anchor then waits: it follows from the one that is chosen.
    """
    settings = loop.settings
    kept = anchor_decay(settings.anchor)
    moves = kept not in (0, 1)
    if number and moves:
        before, result = loop.anchor(number - 1), loop.start(number)
        loop.tell(f"round {number}: anchor: {kept:g} x {before} + {1 - kept:g} x {result}")
        merged(_anchor_merge(loop, number))
    anchor, start = loop.anchor(number), loop.start(number)
    drop = parse_schedule(settings.drop, settings.rounds)(number)
    alphas = alpha if isinstance(alpha, Sequence) else [alpha]
    text = ", ".join(f"{each:g}" for each in alphas)
    loop.tell(f"round {number}: merge: alpha {text}, drop {drop:g}, anchor {anchor}")
    dtype = settings.options.get("dtype", "base")
    if dtype == "base" and anchor not in (settings.base, start):
        dtype = "start"  # the previous merged model, which has the base's dtypes
    given = {
        **MERGE_DEFAULTS,
        **settings.options,
        "base": anchor,
        "sft": loop.place(number, "sft"),
        "out": loop.place(number, name),
        "start": start if start != anchor else None,
        "iteration": number,
        "alpha": alpha,
        "drop": drop,
        "dtype": dtype,
        "overwrite": True,
    }
    following = None
    if moves and alphas is not alpha and number + 1 < settings.rounds:
        with suppress(MergeError):  # its own merge says so
            following = NextAnchor(_anchor_merge(loop, number + 1), like=start)
    try:
        reports = merged(given, None if following is None else following.add)
        reports = reports if isinstance(reports, list) else [reports]
        for note in dict.fromkeys(note for report in reports for note in report.notes):
            loop.tell(note)
        if alphas is not alpha:
            _copy_records(loop, number)
        if following is not None:
            following.hand_over(lambda: merged(_anchor_merge(loop, number + 1)))
    finally:
        if following is not None:
            following.discard()


def _evaluate(loop: Loop, step: str, key: str, model: str, number: int, path: Path) -> None:
    """Evaluate a model and record the numbers that the command writes; nested ones under dotted names."""
    settings = loop.settings
    assert settings.evaluate is not None
    path.unlink(missing_ok=True)
    command = filled(
        settings.evaluate, {"model": model, "json": str(path), "round": str(number), "base": settings.base}
    )
    loop.tell(f"round {number}: evaluate: {command}")
    log = path.with_name(f"evaluate-{path.stem}.log")
    what = f"the evaluate command of {key}"
    run_command(what, command, log, held=loop.held, echo=loop.echo, cure=_cure(loop, "evaluate"))
    loop.finish(step, metrics={**loop.state.metrics, key: read_metrics(path, settings)})


def _remove(loop: Loop, last: int) -> None:
    """Remove the models of all rounds up to `last`; recipes, metrics and logs stay."""
    for number in range(last + 1):
        for chain in ("", BASELINE):
            for path in (loop.place(number, name, chain) for name in ("data", "sft", "merged", "anchor")):
                if path.is_symlink() or path.exists():
                    loop.tell(f"removing {path}")
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
