"""Match the tensor names of sft and start to the base's.

A name the base has is never mapped. For the others, in order: the user's rules; wrappers removed; experts and fused
projections split or fused as in the base; other folders, prefixes and spellings. Last, experts stored transposed are
transposed back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor, renamed, transposed
from ..common.messages import shown
from ..common.notes import Note, note
from ..errors import ArgumentError, MismatchError
from ..model.config import says_tied
from ..model.layout_names import canonical
from ..model.rename_rules import Shape, apply_rules, by_folder, by_name, by_prefix, carried, mapping_note
from ..model.tensor_names import is_embedding_or_head, is_output_head, unwrapped
from .experts import (
    find_transposed,
    fuse_experts,
    fused_shapes,
    is_fused,
    single_layout,
    split_experts,
    transposed_shape,
)
from .fused_projections import split_or_fuse
from .lora_names import names_of


def matched(inputs: Mapping[str, Checkpoint], rules: Sequence[str]) -> dict[str, Checkpoint]:
    """Return the inputs with the tensors of sft and start under the base's names, where a match is found.

    Raises ArgumentError for a rule that changes no name, MismatchError if two tensors get one name.
    """
    base = inputs["base"]
    others = {role: each for role, each in inputs.items() if role != "base"}
    if rules:
        _check_rules(rules, base, others.values())
    return {"base": base} | {
        role: each if each.adapter is not None else with_base_names(each, base, rules) for role, each in others.items()
    }


def _check_rules(rules: Sequence[str], base: Checkpoint, others: Iterable[Checkpoint]) -> None:
    names = [name for each in others for name in (each.tensors if each.adapter is None else names_of(each, base))]
    for rule in rules:
        before, names = names, apply_rules(names, [rule])
        if before == names:
            raise ArgumentError(
                f"--rename '{shown(rule)}' changes none of the {len(names)} tensor names of sft and start, such as"
                f" {shown(names[0]) if names else ''!r}"
            )


def with_base_names(checkpoint: Checkpoint, base: Checkpoint, rules: Sequence[str] = ()) -> Checkpoint:
    """Return a model with its tensors under the base's names, where a match is found. Raises MismatchError."""
    original_names = {name: name for name in checkpoint.tensors}  # new name -> name in the file
    tensors: dict[str, Tensor] = dict(checkpoint.tensors)

    def move(pairs: Mapping[str, str]) -> None:
        """Rename tensors, keeping their order."""
        nonlocal tensors, original_names
        new = [pairs.get(name, name) for name in tensors]
        if len({*new}) < len(new):
            twice = next(name for name, count in Counter(new).items() if count > 1)
            both = [original_names[name] for name in tensors if pairs.get(name, name) == twice]
            raise MismatchError(
                f"two tensors of {checkpoint.label} would become '{shown(twice)}' of {base.label}:"
                f" '{shown(both[0])}' and '{shown(both[1])}'; change --rename, or leave one of them out"
            )
        tensors = dict(zip(new, tensors.values(), strict=True))
        original_names = dict(zip(new, original_names.values(), strict=True))

    move(dict(zip(tensors, apply_rules(tensors, rules), strict=True)))
    notes = checkpoint.notes
    if any(name not in base.tensors for name in tensors):
        move({name: unwrapped(name) for name in tensors if name not in base.tensors})
        tensors, original_names, notes = _match_experts(checkpoint, base, tensors, original_names)
        found: dict[str, str] = {}
        for match in (by_folder, by_prefix, by_name):
            free = {name: _shape(name, tensor) for name, tensor in base.tensors.items() if name not in tensors}
            unmatched = [name for name in tensors if name not in base.tensors]
            # The base may not store a tied head; match one only if it does.
            tied = {name for name in unmatched if is_output_head(name) and says_tied(base.config)}
            tied = set() if any(map(is_output_head, free)) else tied
            # Differing vocabulary sizes are reported later, so shapes do not count here.
            ends = set(filter(is_embedding_or_head, unmatched))
            pairs = match({n: None if n in ends else _shape(n, tensors[n]) for n in unmatched if n not in tied}, free)
            move(pairs)
            found |= pairs
            if match is by_prefix:
                tensors, original_names = split_or_fuse(checkpoint.role, tensors, original_names, base.tensors)
        move({name: new for name in tied if (new := carried(name, found)) is not None})
    changed = {name: old for name, old in original_names.items() if name != old}
    if changed:
        notes = (*notes, mapping_note(changed, checkpoint.label, base.label))
    tensors, more = _transpose_experts(
        checkpoint, tensors, lambda name: {base.tensors[name].shape} if name in base.tensors else set()
    )
    if not changed and not more:
        return checkpoint
    return replace(
        checkpoint,
        tensors={name: renamed(t, name) for name, t in tensors.items()},
        original_names=changed,
        notes=(*notes, *more),
    )


def _shape(name: str, tensor: Tensor) -> Shape:
    """The shape to match by; for fused experts, the same in either orientation."""
    return (*tensor.shape[:1], *sorted(tensor.shape[1:])) if is_fused(canonical(name)) else tensor.shape


def _match_experts(
    checkpoint: Checkpoint, base: Checkpoint, tensors: dict[str, Tensor], original_names: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str], tuple[Note, ...]]:
    """Split fused experts or fuse single ones, as the base stores them."""
    unmatched = [name for name in tensors if name not in base.tensors]
    layout = single_layout(base.tensors)
    notes = checkpoint.notes
    if layout is not None and any(map(is_fused, unmatched)):
        shapes = fused_shapes(layout, base.tensors)
        tensors, more = _transpose_experts(
            checkpoint, tensors, lambda name: shapes.get(name.split(".experts.")[-1].split(".")[0], set())
        )
        notes = (*notes, *more)
        cut = {name: split_experts(checkpoint.role, name, tensors[name], layout) for name in unmatched}
        made = {
            new: (tensor, f"{original_names[old]}{place}") for old, parts in cut.items() for new, tensor, place in parts
        }
        gone = {old for old, parts in cut.items() if parts}
    elif any(map(is_fused, base.tensors)) or any(map(is_fused, map(canonical, base.tensors))):
        made, gone = fuse_experts(checkpoint.role, tensors, unmatched, original_names)
    else:
        return tensors, original_names, notes
    tensors = {name: tensor for name, tensor in tensors.items() if name not in gone}
    original_names = {name: old for name, old in original_names.items() if name not in gone}
    return (
        tensors | {n: t for n, (t, _) in made.items()},
        original_names | {n: old for n, (_, old) in made.items()},
        notes,
    )


def _transpose_experts(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], expected: Callable[[str], Collection[tuple[int, ...]]]
) -> tuple[dict[str, Tensor], tuple[Note, ...]]:
    """Transpose the fused experts that are stored as [in, out] and expected as [out, in], or the reverse."""
    found, unknown = find_transposed(tensors, expected)
    if unknown is not None:
        raise MismatchError(
            f"tensor '{shown(unknown)}' of {checkpoint.label} is square, and without the other tensor of its"
            " experts its orientation is unknown; save both"
        )
    if not found:
        return tensors, ()
    first = next(name for name in tensors if name in found)
    shape = tensors[first].shape
    turned = note(
        "experts transposed",
        "{count} tensors of experts of {label} are stored transposed, '{first}' {shape} for {wanted}; they are"
        " transposed to match the base",
        count=len(found),
        label=checkpoint.label,
        first=shown(first),
        shape=list(shape),
        wanted=list(transposed_shape(shape)),
    )
    return {name: transposed(t, checkpoint.role) if name in found else t for name, t in tensors.items()}, (turned,)
