"""Which situations may be refused, and with which words; and those whose mending is awaited."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .inputs import PARTS
from .naive import Merge
from .situations import Adapter, Round, Situation

When = Callable[[Situation, int, Merge], bool]


@dataclass(frozen=True)
class Refusal:
    """A reason not to merge: when it holds, what is said, and whether a merge would be wrong."""

    reason: str
    when: When
    message: str
    must: bool = False


def _one(situation: Situation, number: int) -> Round:
    return situation.rounds[number]


def _adapter(situation: Situation, number: int) -> Adapter:
    return situation.rounds[number].adapter or Adapter()


def _is_adapter(situation: Situation, number: int) -> bool:
    return situation.rounds[number].adapter is not None


def _tied(situation: Situation, merge: Merge) -> bool:
    return any(any(merge.base[name].ndim == 2 for name in names) for names in merge.classes)


def _of_embedding(adapter: Adapter) -> bool:
    return adapter.embedding or "embedding" in adapter.saved or (bool(adapter.tokens) and adapter.tokens_of != "head")


def _of_head(adapter: Adapter) -> bool:
    return adapter.head or "head" in adapter.saved or (bool(adapter.tokens) and adapter.tokens_of != "embedding")


REFUSALS = (
    Refusal(
        "an adapter's delta is from its start",
        lambda s, n, m: _is_adapter(s, n) and n > 0 and _one(s, n).reference == "base",
        "leave out --reference base",
        must=True,
    ),
    Refusal(
        "vocabularies of other sizes",
        lambda s, n, m: bool(m.resized) and _one(s, n).vocab == "strict",
        "vocabularies differ|shapes must be equal|is this the model that the adapter was trained on",
        must=True,
    ),
    Refusal(
        "factors of an embedding that was resized",
        lambda s, n, m: bool(m.resized) and (_adapter(s, n).embedding or _adapter(s, n).head),
        "changes tensor .* by factors|is this the model that the adapter was trained on",
    ),
    Refusal(
        "DoRA of a Conv1D or an embedding",
        lambda s, n, m: _adapter(s, n).dora and (s.architecture == "gpt2" or _adapter(s, n).embedding),
        "has DoRA for",
    ),
    Refusal(
        "an adapter changes both ends of a tie by factors or rows",
        lambda s, n, m: _tied(s, m) and _of_embedding(_adapter(s, n)) and _of_head(_adapter(s, n)),
        "which are one tensor|in two ways",
    ),
    Refusal(
        "an adapter holds the embedding apart from a tied head",
        lambda s, n, m: _tied(s, m) and _of_embedding(_adapter(s, n)) and not _of_head(_adapter(s, n)),
        "trained apart from the head",
    ),
    Refusal(
        "two changes of one tensor",
        lambda s, n, m: _adapter(s, n).bias != "none" and (_adapter(s, n).lora_bias or bool(_adapter(s, n).tokens)),
        "in two ways|token_adapter.base_layer.bias",
    ),
    Refusal(
        "a convolution by factors",
        lambda s, n, m: s.architecture.endswith("_vl") and "proj" in _adapter(s, n).targets,
        "is this the model that the adapter was trained on",
    ),
    Refusal(
        "the SFT has no head and the base is untied",
        lambda s, n, m: _one(s, n).ends == "tied",
        "in base .* only",
    ),
    Refusal(
        "a part that only the SFT has",
        lambda s, n, m: any(name not in m.base for name in m.sft),
        "|".join(re.escape(file) for file, _ in PARTS.values()),
        must=True,
    ),
)


@dataclass(frozen=True)
class Awaited:
    """What is known to be wrong, until it is mended: situations, and the checks that fail in them."""

    reason: str
    when: When
    checks: str
    came: str = ""


_BY_NAME = ("bert", "roberta", "albert", "electra", "distilbert", "modernbert")

AWAITED = (
    Awaited(
        "weights beside a model or an adapter",
        lambda s, n, m: bool(s.beside) or any(each.part for each in s.rounds[: n + 1]),
        "lost|values|not refused|refused|tie|loading|.*memory|outputs",
    ),
    Awaited(
        "ties known by names",
        lambda s, n, m: s.architecture in _BY_NAME and s.ends in ("tied", "apart"),
        "lost|tie|values|tied when loaded|loading|outputs|refused|.*memory|unknown names",
    ),
    Awaited(
        "a start that was untied",
        lambda s, n, m: n > 0 and s.ends == "tied" and m.broken,
        "lost|loading|tied when loaded|outputs|values",
    ),
)


def allowed(situation: Situation, number: int, merge: Merge, text: str) -> str | None:
    """Return the reason for which a merge may be refused with this message."""
    return next((r.reason for r in REFUSALS if r.when(situation, number, merge) and re.search(r.message, text)), None)


def required(situation: Situation, number: int, merge: Merge) -> str | None:
    """Return the reason for which a merge must be refused."""
    return next((r.reason for r in REFUSALS if r.must and r.when(situation, number, merge)), None)


def awaited(situation: Situation, number: int, merge: Merge, check: str, came: str) -> str | None:
    """Return what has to be mended before a situation can pass."""
    for each in AWAITED:
        if each.when(situation, number, merge) and re.fullmatch(each.checks, check) and re.search(each.came, came):
            return each.reason
    return None
