"""A situation carried out and judged: is OUT what the formulas say, and what transformers loads without a word?"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_imm import MergeError, iter_merged, merge_checkpoints, merge_into, verify

from .inputs import Input, NotBuiltError, State, loaded, write_base, write_sft
from .naive import Merge, dtypes_in, listed, merge_of, says_in, weights_in
from .refusals import Case, allowed, awaited, required
from .situations import Round, Situation
from .zoo import auto_of, is_tied, outputs_of, say_tied

_TOLD = ("refused", "crashed", "loading", "error of the test")  # whose words tell one kind from another


@dataclass(frozen=True)
class Failure:
    """What is wrong: which check, in which round, what was expected and what came."""

    check: str
    number: int
    expected: str
    came: str

    @property
    def kind(self) -> str:
        """The same for failures that are likely of one cause."""
        if self.check not in _TOLD:
            return self.check
        text = re.sub(r"/[^ ]+|'[^']*'|\d+", "_", self.came)
        return f"{self.check}: {text[:120]}"


@dataclass(frozen=True)
class Verdict:
    """How a situation ended."""

    outcome: str  # "merged", "not built: WHY", "refused: REASON", "awaited: WHAT", "failed"
    failure: Failure | None = None
    known: Failure | None = None  # one that is awaited to be mended


def judged(situation: Situation, folder: Path) -> Verdict:
    """Build, merge and compare all rounds of a situation. Nothing raises but an error of this test itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = write_base(situation, folder / "base")
        except NotBuiltError as error:
            return Verdict(f"not built: {error}")
    start = base
    for number, one in enumerate(situation.rounds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                sft = write_sft(situation, number, start, folder / f"sft{number}")
                merge = merge_of(base, start, sft, one=one, iteration=number, seed=situation.seed)
            except NotBuiltError as error:
                return Verdict(f"not built: {str(error)[:200]}")
        case = Case(situation, number, merge)
        out = folder / f"out{number}"
        given = sft.folder / "model.safetensors" if one.sft.form == "file" else sft.folder
        options = _options(situation, one, start.folder if number else None)
        told = _merged(situation, base.folder, given, options, out)
        if told is not None:
            kind, text = told
            reason = allowed(case, text) if kind == "refused" else None
            return Verdict(f"refused: {reason}") if reason else _failed(case, Failure(kind, number, "a merge", text))
        reason = required(case)
        if reason:
            return _failed(case, Failure("not refused", number, f"a refusal: {reason}", "a merge"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failure = _compared(situation, number, merge, base, out)
            if failure is not None:
                return _failed(case, failure)
            failure = _other_ways(merge, number, base.folder, given, sft, options, out)
            if failure is not None and not (failure.check == "refused" and allowed(case, failure.came)):
                return _failed(case, failure)
            model = loaded(situation.architecture, out)
        found = weights_in(out)
        start = Input(out, model, {name: found[name].float() for name in start.parts if name in found})
    return Verdict("merged")


def _failed(case: Case, failure: Failure) -> Verdict:
    reason = awaited(case, failure.check, failure.came)
    return Verdict(f"awaited: {reason}", known=failure) if reason else Verdict("failed", failure)


def _options(situation: Situation, one: Round, start: Path | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "alpha": one.alpha,
        "drop": one.drop,
        "seed": situation.seed,
        "reference": one.reference,
        "vocab": one.vocab,
    }
    if one.dtype != "base":
        numbers["dtype"] = one.dtype
    if one.max_shard_size:
        numbers["max_shard_size"] = f"{one.max_shard_size}B"
    if start is not None:
        numbers["start"] = start
    return numbers


def _merged(
    situation: Situation, base: Path, sft: Path, numbers: Mapping[str, Any], out: Path
) -> tuple[str, str] | None:
    """Merge; return what was said instead of a merge, if anything was."""
    if situation.by_command:
        options = [part for name, value in numbers.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "mergekit_imm", "merge", str(base), str(sft), *options, "-o", str(out)]
        ended = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
        said = ended.stderr.strip().rpartition("\n")[2]
        return None if ended.returncode == 0 else ("refused" if ended.returncode == 1 else "crashed", said)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merge_checkpoints(base, sft, out, **numbers)
            verify(out)
    except MergeError as error:
        return ("crashed" if out.exists() else "refused"), str(error.args[0])
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    return None


def _compared(situation: Situation, number: int, merge: Merge, base: Input, out: Path) -> Failure | None:
    checks: tuple[Callable[..., Failure | None], ...] = (_files, _tensors, _loading, _memory)
    context: dict[str, Any] = {}
    for check in checks:
        failure = check(situation, number, merge, base, out, context)
        if failure is not None:
            return failure
    return None


def _files(
    situation: Situation, number: int, merge: Merge, base: Input, out: Path, context: dict[str, Any]
) -> Failure | None:
    """Each tensor of the base is there, each that a tie was, in its dtype, and none that nobody knows."""
    there, known = dtypes_in(out), set(merge.names)
    lacking = set(merge.stored) - set(there)
    lacking |= {min(names) for names in merge.together if not names & set(there)}
    if lacking:
        return Failure("lost", number, f"tensors {listed(lacking)}", f"{len(there)} others")
    if set(there) - known:
        return Failure("unknown names", number, f"{len(known)} names", listed(set(there) - known))
    wrong = {n: str(d) for n, d in there.items() if d != merge.dtype_of(n)}
    if wrong:
        name = min(wrong)
        return Failure("dtype", number, f"{name} {merge.dtype_of(name)}", wrong[name])
    return None


def _tensors(
    situation: Situation, number: int, merge: Merge, base: Input, out: Path, context: dict[str, Any]
) -> Failure | None:
    """Every tensor is what the formulas give, to the bit where it is defined."""
    state = weights_in(out)
    expected: State = {}
    for names in merge.together:
        written = sorted(names & set(state))
        keys = sorted(names, key=lambda name: (name not in written, name))
        found = None
        for key in keys:
            values = {name: merge.merged(name, key) for name in sorted(names)}
            problem = _first(_unlike(merge, name, state[name], values[name]) for name in written)
            found = found or problem
            if problem is None:
                expected |= values
                break
        else:
            assert found is not None
            kind = "tie" if len(names) > 1 else "values"
            return Failure(kind, number, f"{listed(written)} by the formulas", found)
    context["expected"] = expected
    return None


def _first(found: Any) -> str | None:
    return next((each for each in found if each is not None), None)


def _unlike(merge: Merge, name: str, came: Tensor, expected: Tensor) -> str | None:
    """Say how a tensor differs from what it should be."""
    if came.shape != expected.shape:
        return f"{name} {list(came.shape)} instead of {list(expected.shape)}"
    if merge.exact(name):
        wrong = _bits(came) != _bits(expected)
    else:
        wrong = (came.double() - expected.double()).abs() > merge.slack(name, expected)
    if not wrong.any():
        return None
    at = int(wrong.reshape(-1).nonzero()[0])
    count, total = int(wrong.sum()), wrong.numel()
    one, other = came.reshape(-1)[at].item(), expected.reshape(-1)[at].item()
    exactly = "" if merge.exact(name) else ", within the tolerance"
    return f"{name}: {count} of {total} elements differ{exactly}; element {at} is {one}, expected {other}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def _loading(
    situation: Situation, number: int, merge: Merge, base: Input, out: Path, context: dict[str, Any]
) -> Failure | None:
    """Transformers finds each tensor it wants, and none it does not know, but for those that the base has too."""
    auto = auto_of(situation.architecture)
    try:
        model, told = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        return Failure("loading", number, "a model", f"{type(error).__name__}: {error}"[:400])
    _, before = auto.from_pretrained(base.folder, dtype=torch.float32, output_loading_info=True)
    for kind, names in told.items():
        surplus = set(names) - set(before.get(kind, ()))
        if surplus:
            return Failure("loading", number, "nothing to be said", f"{kind}: {listed(map(str, surplus))}")
    context["model"] = model.eval()
    return None


def _memory(
    situation: Situation, number: int, merge: Merge, base: Input, out: Path, context: dict[str, Any]
) -> Failure | None:
    """The model loaded is the model with the naive tensors put in: tie, tensors, outputs."""
    model = context["model"]
    whole = _with_tensors(situation, merge, base, context["expected"])
    said = says_of_tie(out)
    # T5 takes another meaning from the word in its config, and ties what is equal.
    # And LUKE's says tied of a head that it stores apart, which loads as two.
    known = {None, is_tied(whole), *says_of_tie(base.folder).values()}
    odd = "t5" not in situation.architecture and bool({*said.values()} - known)
    if is_tied(model) != is_tied(whole) or odd:
        return Failure("tied when loaded", number, str(is_tied(whole)), f"{is_tied(model)}, {said}")
    ours, theirs = model.state_dict(), whole.state_dict()
    if ours.keys() != theirs.keys():
        return Failure("names in memory", number, listed(theirs), listed(ours.keys() ^ theirs.keys()))
    for name, expected in theirs.items():
        came = ours[name]
        close = came.shape == expected.shape and torch.allclose(came, expected, rtol=2e-2, atol=2e-3)
        if not close:
            return Failure("values in memory", number, name, f"{list(came.shape)} {list(expected.shape)}")
    one, other = outputs_of(situation.architecture, model), outputs_of(situation.architecture, whole)
    spread = float(other.std())
    if one.shape != other.shape or not torch.allclose(one, other, rtol=0, atol=0.05 * spread):
        return Failure(
            "outputs",
            number,
            f"logits with a spread of {spread:.3g}",
            f"{list(one.shape)}, off by {float((one - other).abs().max()):.3g}"
            if one.shape == other.shape
            else f"{list(one.shape)} and {list(other.shape)}",
        )
    return None


def _other_ways(
    merge: Merge, number: int, base: Path, given: Path, sft: Input, options: Mapping[str, Any], out: Path
) -> Failure | None:
    """`iter_merged` gives the bits of OUT, and so does `merge_into` of a model in float32, where OUT is."""
    one = merge.one
    options = {name: value for name, value in options.items() if name != "max_shard_size"}
    try:
        if one.also == "iter":
            theirs, ours = weights_in(out), dict(iter_merged(base, given, **options))
        elif one.also == "live" and one.adapter is None and one.dtype == "float32" and not {*merge.resized}:
            model = copy.deepcopy(sft.model)
            theirs = type(model).from_pretrained(out, dtype=torch.float32).state_dict()
            merge_into(model, base, **{n: value for n, value in options.items() if n not in ("vocab", "dtype")})
            ours = model.state_dict()
        else:
            return None
    except MergeError as error:
        return Failure("refused", number, f"what `merge_checkpoints` gives, by {one.also}", str(error))
    if theirs.keys() != ours.keys():
        return Failure(f"names by {one.also}", number, listed(theirs), listed(ours.keys() ^ theirs.keys()))
    wrong = [name for name, tensor in theirs.items() if not torch.equal(ours[name].to(tensor.dtype), tensor)]
    return Failure(f"values by {one.also}", number, "the same bits", listed(wrong)) if wrong else None


def says_of_tie(folder: Path) -> Mapping[str, object]:
    """What config.json says about the tie."""
    config = says_in(folder)
    text = config.get("text_config")
    found = {"": config.get("tie_word_embeddings", True)}
    if isinstance(text, dict):
        found["text_config"] = text.get("tie_word_embeddings")
    return found


def _with_tensors(situation: Situation, merge: Merge, base: Input, expected: State) -> Any:
    """The base's model with other tensors put into it, in memory, as transformers does it from a mapping."""
    config = copy.deepcopy(base.model.config)
    config.name_or_path = ""
    config.dtype = torch.float32
    if merge.broken:
        say_tied(config, False)
    model = base.model
    rows = {expected[name].shape[0] for name in merge.resized}
    if len(rows) == 1:
        config.get_text_config().vocab_size = rows.pop()
    state = {name: tensor.float() for name, tensor in expected.items() if name not in merge.base or "/" not in name}
    return type(model).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
