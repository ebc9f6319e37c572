"""Which situations may be refused, and with which words; and those whose mending is awaited."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .inputs import PARTS
from .naive import Merge
from .situations import Adapter, Round, Situation


@dataclass(frozen=True)
class Case:
    """A round of a situation, as it is merged."""

    situation: Situation
    number: int
    merge: Merge

    @property
    def one(self) -> Round:
        """The round."""
        return self.situation.rounds[self.number]

    @property
    def adapter(self) -> Adapter:
        """What an adapter trains; of a full fine-tuning one that trains nothing."""
        return self.one.adapter or Adapter()

    @property
    def tied(self) -> bool:
        """Whether the base has names that mean one matrix."""
        return any(self.merge.base[name].ndim == 2 for names in self.merge.classes for name in names)

    @property
    def of_embedding(self) -> bool:
        """Whether an adapter changes the embedding by its name."""
        a = self.adapter
        return a.embedding or "embedding" in a.saved or (bool(a.tokens) and a.tokens_of != "head")

    @property
    def of_head(self) -> bool:
        """Whether an adapter changes the head by its name."""
        a = self.adapter
        return a.head or "head" in a.saved or (bool(a.tokens) and a.tokens_of != "embedding")


@dataclass(frozen=True)
class Refusal:
    """A reason not to merge: when it holds, what is said, and whether a merge would be wrong."""

    reason: str
    when: Callable[[Case], bool]
    message: str
    must: bool = False


_MISFIT = "is this the model that the adapter was trained on"

REFUSALS = (
    Refusal(
        "an adapter's delta is from its start",
        lambda c: c.one.adapter is not None and c.number > 0 and c.one.reference == "base",
        "leave out --reference base",
        must=True,
    ),
    Refusal(
        "vocabularies of other sizes",
        lambda c: bool(c.merge.resized) and c.one.vocab == "strict",
        f"vocabularies differ|shapes must be equal|{_MISFIT}|in two ways",
        must=True,
    ),
    Refusal(
        "factors of an embedding that was resized",
        lambda c: bool(c.merge.resized) and (c.adapter.embedding or c.adapter.head),
        f"has factors for tensor|{_MISFIT}|in two ways",
    ),
    Refusal(
        "DoRA of a Conv1D or an embedding",
        lambda c: c.adapter.dora and (c.situation.architecture == "gpt2" or c.of_embedding or c.of_head),
        "has DoRA for",
    ),
    Refusal(
        "an adapter changes both ends of a tie by factors or rows",
        lambda c: c.tied and c.of_embedding + c.of_head + c.adapter.ensure_weight_tying > 1,
        "which are one tensor|in two ways",
    ),
    Refusal(
        "a copy of what encoder and decoder share",
        lambda c: (c.tied and bool(c.adapter.saved)) or (c.adapter.embedding and c.situation.ends == "apart"),
        "trained apart from the embeddings of encoder and decoder",
    ),
    Refusal(
        "a bias of logits that an adapter of another vocabulary does not hold",
        lambda c: bool(c.merge.resized) and c.one.adapter is not None,
        "--vocab needs all of them resized",
    ),
    Refusal(
        "a second name of a head's bias that was resized, in an adapter",
        lambda c: bool(c.merge.resized) and c.one.adapter is not None,
        r"in sft .* only, .*\.decoder\.bias",
    ),
    Refusal(
        "ranks by pattern of tied ends, which PEFT then gives another",
        lambda c: c.adapter.ensure_weight_tying and c.adapter.patterns,
        r"and rank \d+ for it",
    ),
    Refusal(
        "a part beside a file that is given alone",
        lambda c: c.one.sft.form == "file" and bool(c.one.part or c.situation.beside),
        "in base .* only",
    ),
    Refusal(
        "a part of the base that a model in memory lacks",
        lambda c: c.one.also == "live" and bool(c.situation.beside),
        "in base .* only",
    ),
    Refusal(
        "one tensor in an adapter and beside it",
        lambda c: c.one.adapter is not None and bool(c.one.part),
        "stores tensor .* twice",
    ),
    Refusal(
        "rows of what a config ties and the model stores apart",
        lambda c: bool(c.adapter.tokens) and (c.situation.ends == "apart" or "t5" in c.situation.architecture),
        "whether both change is not stored",
    ),
    Refusal(
        "an adapter holds the embedding apart from a tied head",
        lambda c: c.tied and ((c.of_embedding and not c.of_head) or c.adapter.saved == ("embedding",)),
        "trained apart from the head",
    ),
    Refusal(
        "two changes of one tensor",
        lambda c: c.adapter.bias != "none" and (c.adapter.lora_bias or bool(c.adapter.tokens)),
        "in two ways|token_adapter.base_layer.bias",
    ),
    Refusal(
        "a rank that PEFT gives a tied head by the embedding's name",
        lambda c: c.adapter.ensure_weight_tying and c.adapter.embedding and c.adapter.patterns,
        _MISFIT,
    ),
    Refusal(
        "a convolution by factors",
        lambda c: c.situation.architecture.endswith("_vl") and "proj" in c.adapter.targets,
        _MISFIT,
    ),
    Refusal(
        "the SFT has no head and the base is untied",
        lambda c: c.one.ends == "tied",
        "in base .* only|lacks it; give --vocab the other model",
    ),
    Refusal(
        "a model in memory has one tensor for two of the base",
        lambda c: c.one.also == "live" and (c.merge.broken or c.situation.ends != "tied"),
        "are one tensor in sft model",
    ),
    Refusal(
        "a part that only the SFT has",
        lambda c: c.one.sft.form != "file" and any(name not in c.merge.base for name in c.merge.sft),
        "|".join(re.escape(file) for file, _ in PARTS.values()),
        must=True,
    ),
)


@dataclass(frozen=True)
class Awaited:
    """What is known to be wrong until it is mended: in which cases, which checks fail, and what is then said."""

    reason: str
    when: Callable[[Case], bool]
    checks: str
    came: str = ""


# When one is mended, take it out: `run` then shows what is left of it.
AWAITED: tuple[Awaited, ...] = ()


def allowed(case: Case, text: str) -> str | None:
    """Return the reason for which a merge may be refused with this message."""
    return next((each.reason for each in REFUSALS if each.when(case) and re.search(each.message, text)), None)


def required(case: Case) -> str | None:
    """Return the reason for which a merge must be refused."""
    return next((each.reason for each in REFUSALS if each.must and each.when(case)), None)


def awaited(case: Case, check: str, came: str) -> str | None:
    """Return what has to be mended before a case can pass."""
    fits = (a for a in AWAITED if a.when(case) and re.fullmatch(a.checks, check) and re.search(a.came, came))
    return next((each.reason for each in fits), None)
