"""Check from headers whether models can be merged, and report every problem, not only the first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..common.display import Displayed, Summary
from ..common.messages import count_text, shown
from ..common.notes import Note, note
from ..errors import MergeError
from ..model.rename_rules import rules_of
from ..model.tensor_names import blanked, is_embedding_or_head
from ..numerics.mask import KEEP_ALL
from ..options.options import MergeOptions
from ..transforms.sparsified_delta import Sparsified
from ..transforms.tokenizer_files import check_tokens
from .decide import decide
from .make_plan import comparer, plan_of
from .open_inputs import open_inputs
from .plan import Item, Plan
from .unchanged import note_if_unchanged

DEFAULTS = MergeOptions()

# Forms of input by the suffix of their files; the first that a model has names it.
_FORMS = {".distcp": "torch.distributed checkpoint", ".bin": "PyTorch files", ".safetensors": "safetensors"}


@dataclass(frozen=True, repr=False)
class CheckReport(Displayed):
    """Result of `check`, printed by `imm-merge --check --json`.

    `inputs`: form, files, tensor and parameter counts of each input (of an adapter, its own). `kinds`: what happens to
    each kind of tensor; `action` is "refused" for tensors that prevent the merge. `problems`: the reasons, one line
    each. The other fields are those of `MergeReport`.
    """

    base: str
    sft: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[dict[str, Any]] = field(default_factory=list)
    renamed: list[dict[str, Any]] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)
    side_files: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def _summary(self) -> Summary:
        can = "cannot" if self.problems else "can"
        rows = [
            [each["role"], str(each["tensors"]), count_text(each["parameters"]), each["form"]] for each in self.inputs
        ]
        line = f"{shown(self.sft)} {can} be merged into {shown(self.base)}"
        return Summary(line, [*self.problems, *self.notes], ("input", "tensors", "parameters", "form"), rows)


def description(
    models: Mapping[str, Checkpoint], items: Iterable[Item], plan: Plan | None, notes: Iterable[Note]
) -> dict[str, Any]:
    """Return the fields that both reports share; without a plan, those that are known."""
    copied: dict[str, list[str]] = {}
    for path, (role, _) in plan.side.items() if plan else ():
        copied.setdefault(role, []).append(path)
    return {
        "kinds": kinds(items),
        "renamed": [
            {"role": role, "name": old, "in_base": new, "tensors": count}
            for role, each in models.items()
            if each.original_names
            for old, new, count in rules_of(each.original_names)
        ],
        "config_changes": dict(plan.config_changes) if plan else {},
        "side_files": copied,
        # Of a start only the weights are used.
        "left_out": {role: list(each.left_out) for role, each in models.items() if each.left_out and role != "start"},
        "notes": list(map(str, notes)),
    }


def check(
    base: str | Path, sft: str | Path, options: MergeOptions = DEFAULTS, *, start: str | Path | None = None
) -> CheckReport:
    """Report from headers whether and how base, sft and optionally start can be merged.

    Reads few values (tied tensors, and a sample to see whether sft differs), so it does not look for NaN or infinity.
    Problems are in the report, not raised.
    """
    refs = {"base": base, "sft": sft, "start": start}
    report = CheckReport(str(base), str(sft))
    try:
        # Any round will do: it only changes the mask.
        inputs = open_inputs(refs, replace(options, iteration=options.round), dry_run=True)
    except MergeError as error:
        report.problems.append(str(error))
        return report
    models, (one,) = inputs.models, inputs.options
    equal = comparer(models)
    complaints: list[tuple[MergeError, Collection[str]]] = []
    decided = decide(models, one, equal, lambda *complaint: complaints.append(complaint))
    plan: Plan | None = None
    unchanged: list[Note] = []
    try:
        plan = None if complaints else plan_of(models, one, decided, equal)
        unchanged = note_if_unchanged(models, decided.items)
    except MergeError as error:
        complaints.append((error, ()))
    notes = [
        *(plan.notes if plan else (note for each in models.values() for note in each.notes)),
        *_other_tokens(models["base"], models["sft"], one.vocab),
        *unchanged,
    ]
    shared = description(models, plan.items if plan else decided.items, plan, notes)
    shared["kinds"] += _refused({name for _, names in complaints for name in names}, list(decided.used.values()))
    return replace(
        report,
        inputs=[_input_description(each) for each in models.values()],
        problems=[str(error) for error, _ in complaints],
        **shared,
    )


def _other_tokens(base: Checkpoint, sft: Checkpoint, vocab: str) -> list[Note]:
    """Note token ids that differ between vocabularies of the same size, which a merge does not compare."""
    if vocab != "strict":
        return []  # already checked
    rows = max(
        (tensor.shape[0] for name, tensor in base.tensors.items() if is_embedding_or_head(name) and tensor.shape),
        default=0,
    )
    try:
        check_tokens(base, sft, rows, "their rows are merged anyway; make sure that this is intended")
    except MergeError as error:
        return [note("other tokens", "{error}", error=error.args[0])]
    return []


def _input_description(each: Checkpoint) -> dict[str, Any]:
    stored: list[Tensor] = list(each.tensors.values())
    if each.adapter is not None:
        form = "LoRA adapter"
        stored = [tensor for file in each.files.values() for tensor in file.tensors]  # not the tensors it changes
    else:
        suffixes = dict.fromkeys(Path(name).suffix for name in each.files)
        form = next((form for suffix, form in _FORMS.items() if suffix in suffixes), f"{', '.join(suffixes)} files")
    return {
        "role": each.role,
        "path": each.ref,
        "form": form,
        "files": list(each.files),
        "tensors": len(stored),
        "parameters": sum(tensor.count for tensor in stored),
    }


def _refused(names: Collection[str], checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Group refused tensors as `kinds` groups the others."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[int]] = {}
    for name in sorted(names):
        held = {each.role: each.tensors[name] for each in checkpoints if name in each.tensors}
        dtypes = tuple((role, tensor.dtype) for role, tensor in held.items())
        groups.setdefault((blanked(name), dtypes), []).append(next(iter(held.values())).count if held else 0)
    return [
        {
            "name": name,
            "action": "refused",
            "tensors": len(counts),
            "elements": sum(counts),
            "read": dict(dtypes),
            "write": "-",
            "drop": None,
        }
        for (name, dtypes), counts in groups.items()
    ]


@cache
def _dropped(keep16: int) -> float:
    return round(1 - keep16 / KEEP_ALL, 6)


def kinds(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Group tensors by kind: the name without its numbers, and what happens to them."""
    groups: dict[tuple[Any, ...], list[Item]] = defaultdict(list)
    for item in items:
        sides, drop = item.sides, None
        sft = sides.get("sft")
        if item.action == "merge":  # the fraction of the delta's elements that is dropped
            drop = sft.drop if isinstance(sft, Sparsified) else _dropped(item.constants.keep16)
        dtypes = tuple([side.sft.dtype if isinstance(side, Sparsified) else side.dtype for side in sides.values()])
        groups[blanked(item.name), item.action, tuple(sides), dtypes, item.outs[0].dtype, drop].append(item)
    return [
        {
            "name": name,
            "action": action,
            "tensors": len(items),
            "elements": sum([item.source.count for item in items]),
            "read": dict(zip(roles, dtypes, strict=True)),
            "write": dtype,
            "drop": drop,
            "bytes_read": sum([side.stored for item in items for side in item.sides.values()]),
            "bytes_written": sum([out.nbytes for item in items for out in item.outs]),
        }
        for (name, action, roles, dtypes, dtype, drop), items in groups.items()
    ]
