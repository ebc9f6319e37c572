"""Was it merged? Recompute what another tool claims to have merged, and say how the folder differs from it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..checkpoint.lazy_tensor import Tensor, fill_as
from ..checkpoint.reader import Files, check_inputs
from ..common.checks import is_number
from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..common.progress import Progress, Watched, check_progress, watched
from ..common.threads import default_workers, in_threads
from ..errors import ArgumentError
from ..numerics.dtypes import DTYPE_BITS, MERGED
from ..options.options import RunOptions
from ..transforms.lora_config import read_settings
from .audit_beside import beside_of, notes_of
from .audit_inputs import Audited, Claimed, open_audit
from .audit_orders import HOLDS, IN_CHANGE, orders
from .audit_sums import Sums, Values, measure
from .audit_tensors import RIGHT, State, TensorAudit, state_of
from .audit_verdict import NARROW, Claim, Verdict, is_held_by, judge

SPAN = 1 << 18  # elements at a time
TRIED = 1 << 15  # elements at the begin, in the middle and at the end of a tensor, for what is only tried
METHODS = ("lora", "imm", "linear")


@dataclass(frozen=True, repr=False)
class AuditReport(Displayed):
    """What `audit` found; `imm-verify --json` prints it."""

    merged: str
    base: str
    sft: str
    claim: Claim
    verdict: Verdict
    tensors: tuple[TensorAudit, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_as_claimed(self) -> bool:
        """Whether the merged model is what it is claimed to be."""
        return self.verdict.is_as_claimed

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "merged": self.merged,
            "base": self.base,
            "sft": self.sft,
            "method": self.claim.method,
            "claim": self.claim.formula,
            "weights": [self.claim.p - self.claim.q, self.claim.q],
            "alpha_was_estimated": self.claim.estimated,
            "as_claimed": self.is_as_claimed,
            "kind": self.verdict.kind,
            "line": self.verdict.line,
            "findings": [
                {"kind": each.kind, "line": each.line, "cure": each.cure, "tensors": each.tensors}
                for each in self.verdict.findings
            ],
            "tensors": {each.name: each.to_dict() for each in self.tensors},
            "notes": list(self.notes),
        }

    def _summary(self) -> Summary:
        counts = Counter(each.state for each in self.tensors)
        rows = [[state, str(count)] for state, count in counts.most_common()]
        findings = [each.line for each in self.verdict.findings if each.line != self.verdict.line]
        line = f"{shown(self.merged)}: {self.verdict.line}"
        return Summary(line, [*findings, *self.notes], ("what it is", "tensors"), rows)


def audit(
    merged: str | Path,
    base: str | Path,
    sft: str | Path,
    *,
    method: str | None = None,
    alpha: float | None = None,
    weights: Sequence[float] | None = None,
    rename: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    dequantize: bool = False,
    workers: int | None = None,
    progress: Watched = None,
) -> AuditReport:
    """Compare a merged model with what it is claimed to be made of, whatever tool made it; nothing is written.

        lora     merged = base + B A scaling, for an adapter; merged = sft, for a full one
        imm      merged = alpha * base + (1 - alpha) * sft        (Eq. 6 without dropping)
        linear   merged = weights[0] * base + weights[1] * sft

    Reads the three models once, in constant memory; tensors that are not as claimed a few times more, to find out what
    they are instead.

    Args:
        merged, base, sft: folders, hub ids or .safetensors files; `sft` may be an adapter, as PEFT stores them.
        method: by default lora for an adapter, imm if alpha is given or the sft is a full model, linear with weights.
        alpha: weight of the base for imm; by default the one that fits best, to three digits.
        weights: of base and sft, for linear.
        rename, leave_out, dequantize, workers, progress: as in `merge_checkpoints`, for base and sft.

    Returns an AuditReport. As claimed means: in each tensor that the sft changes, no element is off by more than two
    steps of its dtype and two of the change; and the coefficient k of merged - base = k (sft - base), by least squares,
    is the claimed one within 1 % and four standard errors. A change computed in bfloat16 and added in float32 passes,
    with a remark. Tensors that the sft does not change are the base's.
    Raises CheckpointError and MismatchError for models that do not belong together, ArgumentError for options that do
    not.

    >>> from mergekit_imm import merge_checkpoints
    >>> report = merge_checkpoints(base_folder, sft_folder, out_folder, alpha=0.3, drop=0)
    >>> print(audit(out_folder, base_folder, sft_folder, alpha=0.3).verdict.line)
    merged as claimed: 1 tensor is 0.3 BASE + 0.7 SFT, within rounding of BF16
    """
    check_method(method, alpha, weights)
    threads = RunOptions(workers=workers, progress=check_progress(progress)).workers or default_workers()
    found = open_audit(merged, base, sft, rename=rename, leave_out=leave_out, dequantize=dequantize)
    with Files(found.models) as files:
        claim = _claim_of(found, method, alpha, weights, files)
        with watched(progress, "auditing", rate=lambda x: f"{x / 1e6:.0f} M elements/s") as update:
            tensors = _measured(found, claim, files, threads, update)
        tensors = _narrower(found, claim, tensors, files, threads)
        tensors = _reordered(found, claim, tensors, files)
    check_inputs(found.models)
    verdict = judge(tensors, claim, beside_of(found))
    return AuditReport(str(merged), str(base), str(sft), claim, verdict, tuple(tensors), tuple(notes_of(found)))


def check_method(method: str | None, alpha: float | None, weights: Sequence[float] | None) -> None:
    """Raise ArgumentError for a method and numbers that do not go together."""
    if method is not None and method not in METHODS:
        raise ArgumentError(f"method is {shown(repr(method), 60)}; it must be one of {', '.join(METHODS)}")
    if alpha is not None:
        if not is_number(alpha) or not 0 <= alpha < 1:
            raise ArgumentError(f"alpha is {shown(repr(alpha), 60)}; it is the weight of the base, 0 <= alpha < 1")
        if weights is not None or method not in (None, "imm"):
            raise ArgumentError("alpha is of method imm; give it with no other method, and without weights")
    if weights is not None:
        if isinstance(weights, str) or len(weights) != 2 or not all(map(is_number, weights)) or not weights[1]:
            raise ArgumentError(f"weights is {shown(repr(weights), 60)}; give two numbers, of base and of sft, not 0")
        if method not in (None, "linear"):
            raise ArgumentError("weights are of method linear; give them with no other method")
    if method == "linear" and weights is None:
        raise ArgumentError("method linear needs weights: two numbers, of base and of sft")


def _claim_of(
    found: Audited, method: str | None, alpha: float | None, weights: Sequence[float] | None, files: Files
) -> Claim:
    adapter = found.models["sft"].adapter
    settings = None if adapter is None else read_settings(adapter, found.models["sft"].label)
    if weights is not None:
        return Claim("linear", float(weights[0] + weights[1]), float(weights[1]), settings)
    if method == "lora" or (method is None and alpha is None and adapter is not None):
        return Claim("lora", 1.0, 1.0, settings)
    if alpha is not None:
        return Claim("imm", 1.0, 1.0 - alpha, settings)
    estimated = _estimated(found, files)
    if not estimated:  # nothing of the sft is there: claim it all
        return Claim("lora", 1.0, 1.0, settings)
    return Claim("imm", 1.0, estimated, settings, estimated=True)


def _estimated(found: Audited, files: Files) -> float:
    """Return the coefficient that fits most tensors, from some elements of each, to three digits."""
    guesses = []
    for each in found.claimed:
        if each.sft is not None and each.is_comparable and each.base.dtype in MERGED:
            sums = _tried(each, 1.0, 1.0, files)
            if sums.coefficient is not None and not sums.not_finite:
                guesses.append(sums.coefficient)
    return min(1.0, max(0.0, round(median(guesses), 3))) if guesses else 1.0


def _spans(claims: Sequence[Claimed]) -> Iterator[tuple[int, int, int]]:
    for number, each in enumerate(claims):
        if each.is_comparable:
            for first in range(0, each.count, SPAN):
                yield number, first, min(SPAN, each.count - first)


def _measured(
    found: Audited, claim: Claim, files: Files, threads: int, progress: Progress | None, narrow: str = ""
) -> list[TensorAudit]:
    """Measure every tensor, once; those stored in more than 16 bits by the steps of `narrow`, if given."""
    claims = found.claimed
    sums: dict[int, dict[int, Sums]] = defaultdict(dict)
    total, done = sum(each.count for each in claims if each.is_comparable), 0

    def measured(task: tuple[int, int, int]) -> tuple[int, int, int, Sums]:
        number, first, count = task
        each = claims[number]
        dtype = narrow if _is_wide(each) else ""
        return number, first, count, _of_span(each, first, count, claim.p, claim.q, files, dtype)

    with closing(in_threads(_spans(claims), lambda: measured, threads)) as results:
        for result in results:
            if result is None:
                continue
            number, first, count, some = result
            sums[number][first] = some
            done += count
            if progress is not None:
                progress(done, total)
    return [_judged(each, sum((sums[n][at] for at in sorted(sums[n])), Sums()), claim) for n, each in enumerate(claims)]


def _of_span(each: Claimed, first: int, count: int, p: float, q: float, files: Files, dtype: str = "") -> Sums:
    """Measure some elements of a tensor; `dtype` is that of its values, if narrower than stored."""
    assert each.merged is not None
    if each.base.dtype not in MERGED:
        return _of_integers(each, first, count, files)
    b, d, m = _read(each, first, count, files)
    return measure(b, d, m, p, q, dtype or each.merged.dtype)


def _read(each: Claimed, first: int, count: int, files: Files) -> tuple[Values, Values | None, Values]:
    """Return elements of the base, the change and the merged tensor."""
    assert each.merged is not None
    operands = each.operands()
    exact = "F64" in {each.merged.dtype, *(tensor.dtype for _, tensor in operands)}
    m = _values("merged", each.merged, first, count, files, exact=exact)
    b, *others = (_values(role, tensor, first, count, files, exact=exact) for role, tensor in operands)
    if not others:
        return b, None, m
    with np.errstate(all="ignore"):
        return b, others[0] if each.is_delta else others[0] - (others[1] if len(others) > 1 else b), m


def _values(role: str, tensor: Tensor, first: int, count: int, files: Files, *, exact: bool) -> Values:
    dtype, kind = ("F64", np.float64) if exact else ("F32", np.float32)
    raw = np.empty(count * DTYPE_BITS[dtype] // 8, np.uint8)
    fill_as(tensor, dtype, lambda t, at, out: files.read(role, t, at, out), first, raw)
    return raw.view(kind)


def _of_integers(each: Claimed, first: int, count: int, files: Files) -> Sums:
    """Compare integers: they are the base's, or the sft's."""
    assert each.merged is not None
    width = DTYPE_BITS[each.merged.dtype] // 8
    if each.merged.dtype != each.base.dtype:
        return Sums(count=count, beyond=count)
    raws = []
    for role, tensor in (("merged", each.merged), *each.operands()):
        raws.append(np.empty((count, width), np.uint8))
        files.read(role, tensor, first * width, raws[-1].reshape(-1))
    same = np.zeros(count, bool)
    for raw in raws[1:]:
        same |= (raw == raws[0]).all(1)
    return Sums(count=count, as_base=int(same.sum()), beyond=int(count - same.sum()))


def _tried(each: Claimed, p: float, q: float, files: Files) -> Sums:
    """Measure elements at the begin, in the middle and at the end."""
    count = min(TRIED, each.count)
    firsts = {0, (each.count - count) // 2, each.count - count}
    return sum((_of_span(each, first, count, p, q, files) for first in sorted(firsts)), Sums())


def _whole(each: Claimed, p: float, q: float, files: Files) -> Sums:
    spans = range(0, each.count, SPAN)
    return sum((_of_span(each, at, min(SPAN, each.count - at), p, q, files) for at in spans), Sums())


def _judged(each: Claimed, sums: Sums, claim: Claim, state: State | None = None, why: str = "") -> TensorAudit:
    """Return what the sums of a tensor say."""
    changed = each.sft is not None and (sums.dd > 0 or not sums.count)
    if state is None:
        state = "missing" if each.merged is None else "shape" if not each.is_comparable else None
    if state == "shape" and each.merged is not None:
        why = f"{list(each.merged.shape)}, claimed {list(each.base.shape)}"
    return TensorAudit(
        name=each.name if not each.alias else each.alias,
        state=state or state_of(sums, claim.p, claim.q),
        elements=each.count,
        dtype=None if each.merged is None else each.merged.dtype,
        changed=changed,
        coefficient=sums.coefficient if changed else None,
        expected=claim.q if changed else None,
        explained=sums.explained if changed else None,
        beyond=sums.beyond,
        worst=sums.worst,
        why=why,
        rank=each.rank,
        scaling=each.scaling,
        sums=sums,
    )


def _narrower(
    found: Audited, claim: Claim, tensors: list[TensorAudit], files: Files, threads: int
) -> list[TensorAudit]:
    """Judge tensors again by the steps of 16 bits if all their values have those, though they are stored wider.

    Where the base is no wider, they were merged so and stored wider, and nothing is wrong with that.
    """
    narrow = next((dtype for dtype in NARROW if is_held_by(tensors, dtype)), None)
    if narrow is None:
        return tensors
    again = _measured(found, claim, files, threads, None, narrow)
    return [
        replace(new, dtype=narrow) if each.base.dtype == narrow and _is_wide(each) else replace(new, sums=old.sums)
        for each, old, new in zip(found.claimed, tensors, again, strict=True)
    ]


def _is_wide(each: Claimed) -> bool:
    """Whether a tensor is stored in more than 16 bits."""
    return each.merged is not None and each.is_comparable and each.merged.dtype in ("F32", "F64")


def _reordered(found: Audited, claim: Claim, tensors: list[TensorAudit], files: Files) -> list[TensorAudit]:
    """Find out what those tensors are that are not as claimed: their parts in another order, or others' parts."""
    claims = {each.name: each for each in found.claimed}
    config = found.models["base"].config
    tries: dict[str, int] = defaultdict(int)
    known: dict[str, set[str]] = defaultdict(set)
    result = []

    def first_of(each: Claimed, first: int, count: int) -> tuple[Values, Values]:
        b, d, m = _read(each, first, count, files)
        return m, b if d is None else b + d * b.dtype.type(claim.q)

    for each, one in zip(found.claimed, tensors, strict=True):
        again = one
        if one.state in ("other", "foreign") and (tries[one.kind] < 3 or known[one.kind]):
            tries[one.kind] += 1
            for order in orders(each, claims, config, first_of):
                if tries[one.kind] > 3 and order.key not in known[one.kind]:
                    continue
                if state_of(_tried(order.claim, claim.p, claim.q, files), claim.p, claim.q) not in RIGHT:
                    continue
                sums = _whole(order.claim, claim.p, claim.q, files)
                if state_of(sums, claim.p, claim.q) in RIGHT:
                    known[one.kind].add(order.key)
                    again = replace(
                        one, state="exchanged", why=order.why, beyond=sums.beyond, worst=sums.worst, sums=sums
                    )
                    break
        result.append(again)
    return _both_ways(result)


def _both_ways(tensors: Sequence[TensorAudit]) -> list[TensorAudit]:
    """Say of two modules of which each holds what belongs to the other that they are exchanged."""
    whys = {(each.layer, each.why) for each in tensors}
    result = []
    for each in tensors:
        prefix = IN_CHANGE if each.why.startswith(IN_CHANGE) else ""
        one, holds, other = each.why.removeprefix(prefix).partition(HOLDS)
        if holds and (each.layer, f"{prefix}{other}{HOLDS}{one}") in whys:
            first, second = sorted((one, other))
            result.append(replace(each, why=f"{prefix}{first} and {second} are exchanged"))
        else:
            result.append(each)
    return result
