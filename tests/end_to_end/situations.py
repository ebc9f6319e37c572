"""What can be drawn, as plain data: an architecture, how inputs are stored, what was trained, how it is merged."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hypothesis import strategies as st

from .zoo import ARCHITECTURES, linear_leaves

Draw = st.DrawFn


@dataclass(frozen=True)
class Stored:
    """How the tensors of a model lie in its folder."""

    form: str = "safetensors"  # "sharded", "bin", "bin sharded"; of an SFT also "file": the file alone is given
    original: bool = True  # save_pretrained's save_original_format: names of the hub, not of memory
    dtype: str = "bfloat16"
    float_norms: bool = False  # norms in float32, whatever the dtype
    every_name: bool = False  # a tied tensor under each of its names
    prefix: str = ""  # of every name, as trainers' wrappers leave it


@dataclass(frozen=True)
class Adapter:
    """What an adapter trains, and how PEFT stores it."""

    targets: tuple[str, ...] = ()  # last parts of the names of linear layers
    embedding: bool = False  # factors for the input embedding
    head: bool = False  # and for the head
    experts: str = ""  # "parameters", or "modules": by PEFT's target_parameters, or as if they were not fused
    r: int = 4
    lora_alpha: float = 8
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    patterns: bool = False  # another rank and alpha for the first target
    saved: tuple[str, ...] = ()  # trained whole: "embedding", "head", "norm"
    tokens: tuple[int, ...] = ()  # trained rows
    tokens_of: str = "embedding"  # or "head", or "both"
    ensure_weight_tying: bool = False
    dtype: str = "float32"
    form: str = "safetensors"  # or "bin"


@dataclass(frozen=True)
class Round:
    """A fine-tuning and its merge."""

    sft: Stored = Stored()
    adapter: Adapter | None = None  # a full fine-tuning if None
    ends: str = "start"  # of a full one: as its start has them; or "untied", "equal", "apart", "tied"
    rows: int = 0  # more than the start's, or fewer
    part: str = ""  # what the SFT alone has beside it: "safetensors", "bin", "value head", "dense"
    vocab: str = "strict"
    alpha: float = 0.5
    drop: float = 0.0
    reference: str = "start"
    dtype: str = "base"
    max_shard_size: int | None = None
    also: str = ""  # another way to the same bits: "iter" (`iter_merged`), or "live" (`merge_into`, of a full one)


@dataclass(frozen=True)
class Situation:
    """All of an end-to-end test."""

    architecture: str = "llama"
    ends: str = "untied"  # "tied"; "equal": untied by config, equal by chance; "apart": tied by config alone
    base: Stored = Stored()
    beside: str = ""  # a part that base and SFT have: "value head", "dense"
    tokenizer: bool = False
    rounds: tuple[Round, ...] = (Round(),)
    by_command: bool = False
    seed: int = 0


def to_json(situation: Situation) -> str:
    """Return a situation as one line of JSON, without what is as by default."""
    return json.dumps(_sparse(situation))


def _sparse(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_sparse(each) for each in value]
    if not isinstance(value, (Situation, Round, Stored, Adapter)):
        return value
    plain = type(value)()
    pairs = {each.name: getattr(value, each.name) for each in fields(value)}
    return {name: _sparse(each) for name, each in pairs.items() if each != getattr(plain, name)}


def from_json(text: str) -> Situation:
    """Return the situation that `to_json` wrote."""
    given = json.loads(text)
    given["base"] = Stored(**given.get("base", {}))
    given["rounds"] = tuple(map(_round, given.get("rounds", [{}])))
    return Situation(**given)


def _round(given: dict[str, Any]) -> Round:
    adapter = given.get("adapter")
    if adapter is not None:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in adapter.items()}
        adapter = Adapter(**values)
    return Round(**{**given, "sft": Stored(**given.get("sft", {})), "adapter": adapter})


def _rarely(draw: Draw, one_in: int) -> bool:
    return draw(st.integers(0, one_in - 1)) == one_in - 1


@st.composite
def stored(draw: Draw) -> Stored:
    return Stored(
        form=draw(st.sampled_from(["safetensors", "safetensors", "sharded", "bin", "bin sharded"])),
        original=not _rarely(draw, 3),
        dtype=draw(st.sampled_from(["bfloat16", "bfloat16", "float32", "float16"])),
        float_norms=_rarely(draw, 6),
        every_name=_rarely(draw, 3),
    )


@st.composite
def adapters(draw: Draw, architecture: str) -> Adapter:
    leaves = linear_leaves(architecture)
    targets = draw(st.lists(st.sampled_from(leaves), max_size=3, unique=True)) if leaves else []
    saved = draw(st.sampled_from([(), (), ("embedding",), ("head",), ("embedding", "head"), ("norm",)]))
    tokens = draw(st.lists(st.integers(0, 89), min_size=1, max_size=4, unique=True)) if _rarely(draw, 5) else []
    embedding = _rarely(draw, 6) and "embedding" not in saved
    head = _rarely(draw, 6) and "head" not in saved
    kinds = [""] + ["parameters"] * bool(ARCHITECTURES[architecture].experts)
    experts = draw(st.sampled_from(kinds + ["modules"] * bool(ARCHITECTURES[architecture].expert_leaves)))
    dora = _rarely(draw, 6) and not experts
    if not (targets or embedding or head or experts):
        targets = [leaves[0]]
    return Adapter(
        targets=tuple(targets),
        embedding=embedding,
        head=head,
        experts=experts,
        r=draw(st.sampled_from([1, 2, 4])),
        lora_alpha=draw(st.sampled_from([8, 1, 3.5])),
        rslora=_rarely(draw, 4),
        dora=dora,
        bias=draw(st.sampled_from(["none", "none", "none", "all", "lora_only"])),
        lora_bias=_rarely(draw, 8) and not dora,
        patterns=_rarely(draw, 4),
        saved=saved,
        tokens=tuple(tokens),
        tokens_of=draw(st.sampled_from(["embedding", "head", "both"])) if tokens else "embedding",
        ensure_weight_tying=_rarely(draw, 4),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        form="bin" if _rarely(draw, 6) else "safetensors",
    )


@st.composite
def rounds(draw: Draw, architecture: str) -> Round:
    adapter = draw(adapters(architecture)) if draw(st.booleans()) else None
    rows = draw(st.sampled_from([4, 32, -6])) if _rarely(draw, 6) else 0
    vocab = draw(st.sampled_from(["base", "sft", "strict"] if rows else ["strict", "strict", "strict", "base", "sft"]))
    kept = ["safetensors", "bin", "value head", "dense"]
    if adapter is None:
        sft = draw(stored())
        sft = replace(sft, form="file" if _rarely(draw, 12) else sft.form)
        sft = replace(sft, prefix=draw(st.sampled_from(["module.", "_orig_mod."])) if _rarely(draw, 8) else "")
        ends = draw(st.sampled_from(["start", "start", "start", "untied", "equal", "apart", "tied"]))
    else:
        sft, ends = Stored(), "start"
    also = draw(st.sampled_from(["iter", "live"])) if _rarely(draw, 4) else ""
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"])) if _rarely(draw, 6) else "base"
    if also == "live":  # of models in float32
        adapter, dtype, rows = None, "float32", 0
    return Round(
        sft=sft,
        adapter=adapter,
        ends=ends,
        rows=rows,
        part=draw(st.sampled_from(kept)) if _rarely(draw, 8) else "",
        vocab=vocab,
        alpha=draw(st.sampled_from([0.5, 0.5, 0.3, 0.8, 0.0, 1.0])),
        drop=draw(st.sampled_from([0.0, 0.5, 0.9])),
        reference="base" if _rarely(draw, 6) else "start",
        dtype=dtype,
        max_shard_size=draw(st.sampled_from([4096, 10**6])) if _rarely(draw, 8) else None,
        also=also,
    )


@st.composite
def situations(draw: Draw) -> Situation:
    architecture = draw(st.sampled_from([*ARCHITECTURES]))
    return Situation(
        architecture=architecture,
        ends=draw(st.sampled_from(["tied", "tied", "untied", "untied", "tied", "untied", "equal", "apart"])),
        base=draw(stored()),
        beside=draw(st.sampled_from(["value head", "dense"])) if _rarely(draw, 8) else "",
        tokenizer=_rarely(draw, 4),
        rounds=tuple(draw(st.lists(rounds(architecture), min_size=1, max_size=2))),
        by_command=_rarely(draw, 40),
        seed=draw(st.integers(0, 99)),
    )


def simpler(situation: Situation) -> list[Situation]:
    """Return situations that differ from one in one respect, which is plain in them."""
    found: list[Situation] = []
    if len(situation.rounds) > 1:
        found += [replace(situation, rounds=situation.rounds[:1]), replace(situation, rounds=situation.rounds[1:])]
    plain = Situation()
    for name in ("base", "beside", "tokenizer", "by_command", "seed", "ends", "architecture"):
        if getattr(situation, name) != getattr(plain, name):
            found.append(replace(situation, **{name: getattr(plain, name)}))
    found += [replace(situation, base=each) for each in _plainer(situation.base, Stored())]

    def with_round(number: int, each: Round) -> Situation:
        return replace(situation, rounds=(*situation.rounds[:number], each, *situation.rounds[number + 1 :]))

    for number, one in enumerate(situation.rounds):
        plain_round = Round()
        for name, value in asdict(plain_round).items():
            if name not in ("sft", "adapter") and getattr(one, name) != value:
                found.append(with_round(number, replace(one, **{name: value})))
        found += [with_round(number, replace(one, sft=each)) for each in _plainer(one.sft, Stored())]
        if one.adapter is not None:
            found.append(with_round(number, replace(one, adapter=None)))
            leaves = linear_leaves(situation.architecture)
            simplest = replace(Adapter(), targets=leaves[:1])
            found += [with_round(number, replace(one, adapter=each)) for each in _plainer(one.adapter, simplest)]
            if not one.adapter.targets:
                continue
    return found


def _plainer(one: Any, plain: Any) -> list[Any]:
    names = [name for name in asdict(plain) if getattr(one, name) != getattr(plain, name)]
    whole = [plain] if len(names) > 1 else []
    return whole + [replace(one, **{name: getattr(plain, name)}) for name in names]
