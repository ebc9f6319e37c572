"""Open the three models of an audit, and pair their tensors: what base and sft claim, and what is stored."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Extended, Slice, Tensor, renamed, sliced
from ..checkpoint.open_checkpoint import open_checkpoint
from ..checkpoint.safetensors_file import ADAPTER_CONFIG
from ..common.garbage import uncollected
from ..common.messages import shown
from ..common.notes import Note
from ..errors import CheckpointError, MergeError
from ..model.config import CONFIG, says_tied
from ..model.tensor_names import is_output_head
from ..numerics.dtypes import MERGED
from ..options.options import MergeOptions
from ..plan.compatibility import copied_by
from ..plan.decide import Decided, decide
from ..plan.make_plan import comparer
from ..plan.open_inputs import check_left_out, check_platform, input_refs, prepared
from ..plan.plan import Item
from ..transforms.fp8 import check_unquantised
from ..transforms.lora_parts import without_wrappers
from ..transforms.lora_tensor import LowRank, OfExperts, Rescaled
from ..transforms.match_names import matched

ADDED = " (added rows)"
# Buffers that older files store and loaders make again: transformers does not save them.
_MADE_AGAIN = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias)$")
_FACTORS = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.|$)")


@dataclass(frozen=True)
class Claimed:
    """A tensor of the merged model: what it is claimed to be made of, and what is stored."""

    name: str  # of the base
    base: Tensor
    base_role: str  # the input that `base` is read from
    sft: Tensor | None  # None: the sft does not change it
    merged: Tensor | None  # None: it is missing
    alias: str = ""  # the merged name, if it is another
    rank: int | None = None  # of an adapter's factors
    scaling: float | None = None
    is_delta: bool = False  # whether `sft` holds the change itself
    origin: Tensor | None = None  # what the sft is the change of, if not `base`
    rows: tuple[int, int] | None = None  # stored and claimed ones, if they differ

    def operands(self) -> tuple[tuple[str, Tensor], ...]:
        """Return what to read: the base, the sft and what it is the change of, each with its input."""
        found = [(self.base_role, self.base)]
        if self.sft is not None:
            found.append(("sft", self.sft))
            if not self.is_delta and self.origin is not None:
                found.append((self.base_role, self.origin))
        return tuple(found)

    @property
    def count(self) -> int:
        """Elements to compare: those of the rows that both have."""
        return self.base.count if self.merged is None else min(self.base.count, self.merged.count)

    @property
    def is_comparable(self) -> bool:
        """Whether the stored tensor has the claimed shape, but for the number of rows."""
        if self.merged is None or len(self.merged.shape) != len(self.base.shape):
            return False
        kinds = {self.merged.dtype in MERGED, self.base.dtype in MERGED}
        rows = self.merged.shape[1:] == self.base.shape[1:] or {self.merged.shape[:1], self.base.shape[:1]} == {(1,)}
        return rows and len(kinds) == 1


@dataclass(frozen=True)
class Audited:
    """The models of an audit, and their tensors in pairs."""

    models: dict[str, Checkpoint]  # base, sft, merged
    claimed: tuple[Claimed, ...]
    surplus: tuple[str, ...]  # names that only the merged model has
    factors: tuple[str, ...]  # names of an adapter that lies unmerged among the merged tensors
    notes: tuple[Note, ...]
    problems: tuple[str, ...]  # tensors of base and sft that do not fit together, which nothing is claimed about


@uncollected()
def open_audit(
    merged: str | Path,
    base: str | Path,
    sft: str | Path,
    *,
    rename: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    dequantize: bool = False,
) -> Audited:
    """Open the models, match names, apply an adapter. Raises MergeError for what cannot be compared at all."""
    check_platform()
    refs = input_refs({"merged": merged, "base": base, "sft": sft})
    _check_no_adapter(merged)
    opened = {role: open_checkpoint(ref, role, leave_out=leave_out) for role, ref in refs.items()}
    check_left_out(opened, leave_out)
    found = opened.pop("merged")
    check_unquantised(found, copied_by(MergeOptions()))
    models, decided, problems = _base_and_sft(opened, rename, dequantize)
    found, factors = _without_factors(found)
    if not found.tensors.keys() <= models["base"].tensors.keys():
        found = matched({"base": models["base"], "merged": found}, ())["merged"]
    claimed = tuple(each for item in decided.items for each in _claims(item, decided, models, found))
    known = {each.alias or each.name for each in claimed} | {*models["base"].tensors, *models["sft"].tensors}
    surplus = tuple(name for name in found.tensors if name not in known)
    notes = tuple(note for each in (*models.values(), found) for note in each.notes)
    return Audited({**models, "merged": found}, claimed, surplus, factors, notes, problems)


def _check_no_adapter(merged: str | Path) -> None:
    """Refuse a folder with an adapter and no model."""
    folder = Path(merged).expanduser()
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"merged {shown(merged)} is an adapter: nothing is merged there; give the folder of the merged model"
        )


def _base_and_sft(
    opened: dict[str, Checkpoint], rename: Sequence[str], dequantize: bool
) -> tuple[dict[str, Checkpoint], Decided, tuple[str, ...]]:
    """Return base and sft under the same names, what becomes of their tensors, and which do not fit together.

    If their vocabularies differ, the sft's is claimed.
    """
    best: tuple[dict[str, Checkpoint], Decided, tuple[str, ...]] | None = None
    for vocab in ("strict", "sft"):
        options = MergeOptions(
            alpha=0.0, drop=0.0, iteration=0, vocab=vocab, rename=tuple(rename), dequantize=dequantize
        )
        problems: list[str] = []

        def complain(error: MergeError, names: Collection[str], to: list[str] = problems) -> None:
            if not names:
                raise error
            to.append(str(error))

        try:
            models = prepared(opened, options)
            decided = decide(models, options, comparer(models), complain)
        except MergeError:
            if best is None:
                raise
            break
        if best is None or len(problems) < len(best[2]):
            best = models, decided, tuple(problems)
        if not problems:
            break
    assert best is not None
    if not best[1].items:
        raise CheckpointError(best[2][0])
    return best


def _without_factors(found: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return the model without PEFT's wrappers in its names and without factors, and the names of those."""
    factors = tuple(name for name in found.tensors if _FACTORS.search(name))
    wrapped = [n for n in found.tensors if "base_layer" in n.split(".") or n.startswith("base_model.model.")]
    if not factors and not wrapped:
        return found, ()
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.tensors.items():
        if not _FACTORS.search(name):
            new = without_wrappers(name) if wrapped else name
            tensors.setdefault(new, renamed(tensor, new))
    return replace(found, tensors=tensors), factors or tuple(wrapped)


def _claims(item: Item, decided: Decided, models: dict[str, Checkpoint], found: Checkpoint) -> list[Claimed]:
    """Return the claims of a tensor: one for each name it is stored under, and one for its added rows."""
    group = decided.ties.groups.get(item.name)
    names = [name for name in (group.names if group else (item.name,)) if name in found.tensors]
    base, sft = item.sides["base"], item.sides.get("sft")
    common = item.common
    if common is not None:
        base = base.own if isinstance(base, Extended) else base
        sft = sft.own if isinstance(sft, Extended) else sft
    claims = []
    for name in names or [""]:
        stored = found.tensors.get(name)
        if stored is None and (_MADE_AGAIN.search(item.name) or _is_tied_head(item.name, models["base"], found)):
            continue
        alias = name if name != item.name else ""
        whole = stored
        if common is not None and stored is not None and stored.count > common:
            owner = item.sides[item.owner]
            whole = sliced(stored, "merged", stored.name, 0, base.shape)
            rest = (min(owner.count, stored.count) - common,)
            there = sliced(stored, "merged", stored.name, common, rest)
            added = sliced(owner, item.owner, item.name, common, rest)
            claims.append(Claimed(f"{item.name}{ADDED}", added, item.owner, None, there, f"{name}{ADDED}"))
        claims.append(
            Claimed(
                item.name,
                base,
                "base",
                sft,
                whole,
                alias,
                _rank(sft),
                _scaling(sft),
                is_delta=sft is not None and sft.is_delta,
                rows=None if stored is None else _rows(stored, item.source),
            )
        )
    return claims


def _is_tied_head(name: str, base: Checkpoint, found: Checkpoint) -> bool:
    """Whether a head is missing that base and merged tie, by their configs, to an embedding."""
    return is_output_head(name) and name not in base.tensors and says_tied(base.config) and says_tied(found.config)


def _rows(stored: Tensor, claimed: Tensor) -> tuple[int, int] | None:
    """Return the rows of a stored tensor and of the claimed one, if nothing else differs."""
    if len(stored.shape) != len(claimed.shape) or stored.shape[1:] != claimed.shape[1:]:
        return None
    return (stored.shape[0], claimed.shape[0]) if stored.shape != claimed.shape else None


def _rank(sft: Tensor | None) -> int | None:
    whole = _whole(sft)
    if isinstance(whole, LowRank):
        return whole.rank if whole.right is not None else None
    return whole.a.shape[0] // whole.shape[0] if isinstance(whole, OfExperts) else None


def _scaling(sft: Tensor | None) -> float | None:
    whole = _whole(sft)
    return whole.scaling if isinstance(whole, LowRank | OfExperts) else None


def _whole(sft: Tensor | None) -> Tensor | None:
    """Return what a slice of an adapter's delta is a slice of; of a DoRA its factors."""
    while isinstance(sft, Slice):
        sft = sft.whole
    return sft.change if isinstance(sft, Rescaled) else sft
