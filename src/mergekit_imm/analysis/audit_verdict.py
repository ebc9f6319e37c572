"""What an audit found, as lines: each finding of one kind, what it means and what to do, from plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..common.messages import shown
from ..model.tensor_names import is_embedding_or_head, is_output_head, layer_order
from .audit_sums import Sums
from .audit_tensors import ERRORS, NO_MAGNITUDES, TensorAudit

SHOWN = 4  # kinds of modules in a line
FEW = 0.01  # share of elements that may be off by damage, when the others are right
LEAST = 20  # elements that 16 bits cannot hold, to judge by
TWICE = "merged twice"
NARROW = ("BF16", "F16")
AS_CLAIMED, UNTOLD = "as claimed", "untold"


@dataclass(frozen=True)
class Claim:
    """What the merged model is said to be: p base + q (sft - base)."""

    method: str  # lora, imm or linear
    p: float
    q: float
    adapter: Mapping[str, Any] | None = None  # the adapter's settings; None for a full sft
    estimated: bool = False  # alpha was not given

    @property
    def formula(self) -> str:
        """The claim in words."""
        if self.method == "linear":
            return f"{self.p - self.q:g} BASE + {self.q:g} SFT"
        if self.q == 1:
            return "the SFT" if self.adapter is None else "BASE + the adapter's change"
        return f"{1 - self.q:g} BASE + {self.q:g} SFT"


@dataclass(frozen=True)
class Beside:
    """What was found beside the weights."""

    factors: Sequence[str] = ()  # of an adapter among the merged tensors
    tokenizer: str = ""  # how it differs from what was trained; "" if it does not
    untied: str = ""  # a head that the config ties away
    rows: str = ""  # how the vocabulary differs


@dataclass(frozen=True)
class Finding:
    """One thing that is not as claimed: its kind, one line that says what, and what it means or cures it."""

    kind: str
    line: str
    cure: str
    tensors: int = 0


@dataclass(frozen=True)
class Verdict:
    """Whether a merge is as claimed, in one line, and everything that is not, the worst first."""

    kind: str
    line: str
    findings: tuple[Finding, ...] = field(default=())

    @property
    def is_as_claimed(self) -> bool:
        """Whether nothing is wrong, and it could be seen."""
        return self.kind == AS_CLAIMED


def judge(tensors: Sequence[TensorAudit], claim: Claim, beside: Beside) -> Verdict:
    """Return the verdict on a merged model from what was found of its tensors, and beside them."""
    changed = [each for each in tensors if each.changed]
    narrowed = _narrowed(tensors)

    def left(some: Sequence[TensorAudit]) -> list[TensorAudit]:
        return [each for each in some if not (narrowed and _is_excused(each))]

    findings = [
        *(_apart(beside.factors) or _as_base(changed)),
        *_scaled(changed, claim),
        *_dropped(changed, claim),
        *_exchanged(tensors),
        *narrowed,
        *_others(left(changed), left(tensors), claim),
        *_lost(tensors),
        *_beside(beside),
    ]
    seen = [each for each in changed if each.state == AS_CLAIMED]
    if findings:
        return Verdict(findings[0].kind, findings[0].line, tuple(findings))
    if not seen:
        why, cure = "SFT changes nothing", "was it trained? An adapter begins with lora_B = 0"
        if any(each.state == "hidden" for each in changed):
            why = "what SFT changes is smaller than the steps of the dtype that MERGED is stored in"
            cure = "compare in float32"
        what = f"nothing can be told: {why}"
        return Verdict(UNTOLD, what, (Finding(UNTOLD, what, cure),))
    dtypes = " and ".join(sorted({str(each.dtype) for each in seen}))
    rough = sum(each.is_rough for each in seen)
    how = f", {rough} of them computed less precisely" if rough else ""
    guess = f" (alpha {1 - claim.q:g} fits best; none was given)" if claim.estimated else ""
    line = f"merged as claimed: {_count(seen)} {_are(seen)} {claim.formula}{guess}, within rounding of {dtypes}{how}"
    return Verdict(AS_CLAIMED, line)


def _apart(factors: Sequence[str]) -> list[Finding]:
    if not factors:
        return []
    return [
        Finding(
            "adapter apart",
            f"not merged: the adapter lies beside the weights, in {len(factors)} tensors such as '{shown(factors[0])}'",
            "it was saved without merging; save what merge_and_unload() returns",
            len(factors),
        )
    ]


def _as_base(changed: Sequence[TensorAudit]) -> list[Finding]:
    lacking = [each for each in changed if each.state == "base"]
    if not lacking:
        return []
    if all(each.state in ("base", "hidden") for each in changed):
        line = f"not merged: {places(lacking, lacking)} that SFT changes {_are(lacking)} BASE's"
        return [Finding("not merged", line, "save the merged model, not the one that was loaded", len(lacking))]
    line = f"merged in part: of what SFT changes, {places(lacking, changed)} {_are(lacking)} BASE's"
    return [Finding("merged in part", line, "were these modules among those that were merged?", len(lacking))]


def _scaled(changed: Sequence[TensorAudit], claim: Claim) -> list[Finding]:
    found = [each for each in changed if each.state == "scaled"]
    if not found:
        return []
    reasons = [text for text, factor in _factors(claim).items() if _explains(factor, found)]
    factors = [each.factor or 0.0 for each in found]
    middle = median(factors)
    where = places(found, changed)
    if _explains(lambda _: middle, found):
        size = f"{middle:.3g} times what is claimed"
    else:
        size = f"{min(factors):.3g} to {max(factors):.3g} times what is claimed"
    kind = next((reason for reason in reasons if reason.startswith(TWICE)), "scaled")
    rest = [reason for reason in reasons if reason != kind]
    why = (f"; or {', or '.join(rest)}" if kind != "scaled" else f": {', or '.join(rest)}") if rest else ""
    why = why or (_fitting(middle, claim) if kind == "scaled" else "")
    line = f"{kind}: the change of {where} is {size}{why}"
    kind = TWICE if kind != "scaled" else kind
    return [Finding(kind, line, "merge BASE again, once, with the numbers that the training used", len(found))]


def _factors(claim: Claim) -> dict[str, Callable[[TensorAudit], float | None]]:
    """Return what makes a change larger or smaller, and by which factor."""
    if claim.adapter is None or claim.method != "lora":
        return {
            f"{TWICE}, the first result as the SFT of the second": lambda _: claim.q,
            "MERGED is SFT itself": lambda _: 1 / claim.q if claim.q else None,
            "added twice": lambda _: 2.0,
            "alpha was taken as the weight of SFT": lambda _: (1 - claim.q) / claim.q if claim.q else None,
        }
    rank, alpha = claim.adapter["r"], claim.adapter["lora_alpha"]
    by_root = bool(claim.adapter.get("use_rslora"))
    default = alpha / math.sqrt(rank) if by_root else alpha / rank

    def of_rank(factor: Callable[[float], float]) -> Callable[[TensorAudit], float | None]:
        return lambda each: None if each.rank is None or each.rank == 1 else factor(each.rank)

    def over_scaling(value: Callable[[TensorAudit], float]) -> Callable[[TensorAudit], float | None]:
        return lambda each: None if not each.scaling or not each.rank else value(each) / each.scaling

    patterns = bool(claim.adapter.get("rank_pattern") or claim.adapter.get("alpha_pattern"))
    return {
        TWICE: lambda _: 2.0,
        **(
            {"alpha / r was used, though use_rslora asks for alpha / sqrt(r)": of_rank(lambda r: 1 / math.sqrt(r))}
            if by_root
            else {"alpha / sqrt(r) was used, though use_rslora is off: it asks for alpha / r": of_rank(math.sqrt)}
        ),
        "B A was added without its scaling": over_scaling(lambda _: 1.0),
        "alpha was not divided by r": of_rank(math.sqrt if by_root else float),
        **({"rank_pattern and alpha_pattern were left out": over_scaling(lambda _: default)} if patterns else {}),
        "it was subtracted": lambda _: -1.0,
    }


def _explains(factor: Callable[[TensorAudit], float | None], found: Sequence[TensorAudit]) -> bool:
    """Whether a factor is the one found: in each tensor, and more exactly in all together."""
    clear = any(each.sums.clear >= 64 for each in found)
    total_md = total_dd = left = 0.0
    for each in found:
        x, k = factor(each), each.coefficient
        if x is None or k is None or not each.expected:
            return False
        of_claim = x * each.expected
        error = ERRORS * each.sums.error(each.sums.left_by(k))
        if abs(k - of_claim) > (0.02 if each.sums.clear >= 64 else 0.1) * abs(of_claim) + error:
            return False
        if clear and each.sums.clear < 64:
            continue
        md, dd = (each.sums.clear_md, each.sums.clear_dd) if clear else (each.sums.md, each.sums.dd)
        total_md += of_claim * md
        total_dd += of_claim**2 * dd
        left += of_claim**2 * dd * error**2
    # A change that is small is lost in rounding, and a smaller one more so.
    return abs(total_md / total_dd - 1) <= (0.005 if clear else 0.1) + math.sqrt(left / total_dd) / math.sqrt(
        len(found)
    )


def _fitting(factor: float, claim: Claim) -> str:
    """Return which alpha would give such a change."""
    if claim.method == "lora" and claim.adapter is not None:
        return f": as lora_alpha {claim.adapter['lora_alpha'] * factor:.4g} in place of {claim.adapter['lora_alpha']:g}"
    found = 1 - claim.q * factor
    if claim.method == "imm":
        return f": as of alpha {found:.4g}, not {1 - claim.q:g}"
    return f": as {found:.4g} BASE + {1 - found:.4g} SFT" if claim.adapter is None else ""


def _dropped(changed: Sequence[TensorAudit], claim: Claim) -> list[Finding]:
    found = [each for each in changed if each.state == "dropped"]
    if not found:
        return []
    kept = sum(each.sums.moved_dd for each in found) / sum(each.sums.dd for each in found)
    factor = sum(each.sums.md for each in found) / sum(each.sums.moved_dd for each in found) / (claim.q or 1)
    line = (
        f"dropped: in {places(found, changed)} about {1 - kept:.0%} of the change is missing, element by element, and"
        f" the rest is {factor:.3g} times what is claimed: as DARE with drop {1 - kept:.2g}"
    )
    return [Finding("dropped", line, "its mask is not known here: ask the tool that merged for its seed", len(found))]


def _exchanged(tensors: Sequence[TensorAudit]) -> list[Finding]:
    found = [each for each in tensors if each.state == "exchanged"]
    findings = []
    for why in dict.fromkeys(each.why for each in found):
        some = [each for each in found if each.why == why]
        kind = "DoRA left out" if why == NO_MAGNITUDES else "exchanged"
        line = f"{kind}: {places(some, tensors)} {_are(some)} as claimed, but {why}"
        cure = "merge with a version of the tool that reads the adapter as PEFT does"
        findings.append(Finding(kind, line, cure, len(some)))
    return findings


def is_held_by(tensors: Sequence[TensorAudit], narrow: str) -> bool:
    """Whether 16 bits hold all values that are stored wider, though they do not hold what is claimed."""
    lost, gone = _narrow_counts(tensors, narrow)
    return lost >= LEAST and gone >= 0.999 * lost


def _narrow_counts(tensors: Sequence[TensorAudit], narrow: str) -> tuple[int, int]:
    """Count the elements of the claim that 16 bits do not hold, and of these, those of the merged that they hold."""
    name = {"F16": "16", "BF16": "_b16"}[narrow]
    some = [each.sums for each in tensors if each.dtype not in (None, narrow)]
    return sum(getattr(each, f"narrow{name}") for each in some), sum(getattr(each, f"narrowed{name}") for each in some)


def _narrowed(tensors: Sequence[TensorAudit]) -> list[Finding]:
    """Find values that went through 16 bits, where the claim and the stored dtype hold more."""
    narrow = next((each for each in NARROW if is_held_by(tensors, each)), None)
    if narrow is None:
        return []
    lost, gone = _narrow_counts(tensors, narrow)
    stored = " and ".join(sorted({str(each.dtype) for each in tensors} - {narrow, "None"}))
    what = f"of {lost} claimed numbers that {stored} holds and {narrow} does not, {gone} are gone"
    line = f"rounded through {narrow}: {what}"
    cure = "merge in float32: load the model with that dtype, and cast the result"
    return [Finding(f"rounded through {narrow}", line, cure, len(tensors))]


def _is_excused(each: TensorAudit) -> bool:
    """Whether rounding to 16 bits explains how many elements of a tensor are off."""
    return each.state in ("other", "foreign") and each.beyond <= each.sums.narrow16 + each.sums.narrow_b16


def _others(changed: Sequence[TensorAudit], tensors: Sequence[TensorAudit], claim: Claim) -> list[Finding]:
    findings = []
    bad = [each for each in tensors if each.state == "not finite"]
    if bad:
        line = f"not finite: {places(bad, tensors)} {_hold(bad)} NaN or infinity where the claim does not"
        findings.append(Finding("not finite", line, "it overflowed; merge in float32 or bfloat16", len(bad)))
    other = [each for each in changed if each.state == "other"]
    few = [each for each in other if each.beyond <= FEW * each.elements]
    if few:
        off, of, worst = sum(e.beyond for e in few), sum(e.elements for e in few), max(e.worst for e in few)
        line = f"not as claimed: in {places(few, changed)} {off} of {of} elements are off, by up to {worst:.4g} steps"
        findings.append(
            Finding("not as claimed", line, "was it written whole? Compare it with another merge", len(few))
        )
    other = [each for each in other if each not in few]
    if other:
        where = places(other, changed)
        line = f"not as claimed: {where} {_are(other)} neither BASE's nor the claim; {_fit(other, claim)}"
        cure = "merged with another adapter, into another base, or by another method"
        findings.append(Finding("not as claimed", line, cure, len(other)))
    added = [each for each in tensors if each.state == "foreign" and each.is_added]
    if added:
        line = f"rows not taken: {places(added, tensors)} are not SFT's"
        findings.append(Finding("rows lost", line, "merge into a BASE resized with SFT's embeddings", len(added)))
    foreign = [each for each in tensors if each.state == "foreign" and not each.is_added]
    if foreign:
        where = places(foreign, tensors)
        line = f"changed beyond the claim: {where}, which SFT does not change, {_are(foreign)} not BASE's"
        findings.append(Finding("another base", line, "was it merged into another BASE?", len(foreign)))
    return findings


def _fit(tensors: Sequence[TensorAudit], claim: Claim) -> str:
    """Return the weighted sum of base and sft that comes nearest to all tensors, and how near."""
    total = sum((each.sums for each in tensors), Sums())
    k = total.md / total.dd if total.dd else 0.0
    share = max(0.0, 1 - total.left_by(k) / total.mm) if total.mm else 0.0
    determinant = total.bb * total.dd - total.bd**2
    if determinant > 1e-12 * total.bb * total.dd:
        x = (total.mb * total.dd - total.md * total.bd) / determinant
        y = (total.md * total.bb - total.mb * total.bd) / determinant
        both = max(0.0, min(1.0, (x * total.mb + y * total.md) / total.mm)) if total.mm else 0.0
        if both > 0.99 > share:
            return f"{claim.p + x - y:.3g} BASE + {y:.3g} SFT fits them"
    return f"{k:.3g} times the change explains {share:.0%} of the difference from BASE"


def _lost(tensors: Sequence[TensorAudit]) -> list[Finding]:
    findings = []
    missing = [each for each in tensors if each.state == "missing"]
    heads = [each for each in missing if is_output_head(each.name)]
    if heads:
        line = f"head lost: '{shown(heads[0].name)}' is not in MERGED"
        cure = "a loader ties it to the embedding or draws it at random; save the head, with tie_word_embeddings false"
        findings.append(Finding("head lost", line, cure, len(heads)))
    rest = [each for each in missing if each not in heads]
    if rest:
        line = f"lost: {places(rest, tensors)} {_are(rest)} not in MERGED"
        cure = "loaders draw at random what they do not find; copy it from BASE"
        findings.append(Finding("lost", line, cure, len(rest)))
    shapes = [each for each in tensors if each.state == "shape"]
    if shapes:
        line = f"of another shape: {places(shapes, tensors)}{f' ({shapes[0].why})' if shapes[0].why else ''}"
        findings.append(Finding("shape", line, "is this the model that was merged?", len(shapes)))
    return findings


def _beside(beside: Beside) -> list[Finding]:
    findings = []
    if beside.rows:
        cure = "added tokens have no embedding then; save the resized model"
        findings.append(Finding("rows lost", f"rows lost: {beside.rows}", cure))
    if beside.untied:
        cure = "set tie_word_embeddings to false in config.json, or the head is replaced by the embedding"
        findings.append(Finding("tied away", f"head lost: {beside.untied}", cure))
    if beside.tokenizer:
        cure = "copy the tokenizer that SFT was trained with"
        findings.append(Finding("tokenizer", f"tokenizer: {beside.tokenizer}", cure))
    return findings


def places(some: Sequence[TensorAudit], among: Sequence[TensorAudit]) -> str:
    """Return where tensors lie: kinds of modules, in how many of the layers that have them."""
    if len(some) == len(among) > 1:
        return f"all {len(some)} tensors"
    kinds = list(dict.fromkeys(each.kind for each in some))
    texts = [_place([x for x in some if x.kind == kind], [x for x in among if x.kind == kind]) for kind in kinds]
    more = [f"{len(texts) - SHOWN} more kinds"] if len(texts) > SHOWN else []
    texts = [*texts[:SHOWN], *more]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _place(some: Sequence[TensorAudit], among: Sequence[TensorAudit]) -> str:
    kind = shown(some[0].kind, 60)
    layers, every = _layers(some), _layers(among)
    if not layers:
        return kind if is_embedding_or_head(f"{some[0].kind}.weight") or len(some) == 1 else f"{kind} ({len(some)})"
    if len(some) == len(among):
        of = {1: shown(layers[0], 60), 2: "both layers"}
        return f"{kind} in {of.get(len(layers), f'all {len(layers)} layers')}"
    if layers == every:
        return f"{kind} ({len(some)} of {len(among)}, in all layers)"
    first = ", ".join([*(shown(each, 60) for each in layers[:2]), *(["…"] if len(layers) > 2 else [])])
    return f"{kind} in {len(layers)} of {len(every)} layers ({first})"


def _layers(tensors: Collection[TensorAudit]) -> list[str]:
    return sorted({each.layer for each in tensors if each.layer is not None}, key=layer_order)


def _count(tensors: Sequence[TensorAudit]) -> str:
    return "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"


def _are(tensors: Sequence[TensorAudit]) -> str:
    return "is" if len(tensors) == 1 else "are"


def _hold(tensors: Sequence[TensorAudit]) -> str:
    return "holds" if len(tensors) == 1 else "hold"
