"""Names that differ between models: which tensor of one is which of the base.

A name that is the base's is never mapped. For the others are tried, in this order: the user's rules, wrappers left
out, fused experts cut or joined as the base has them, and one prefix in the place of another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .checkpoint.adapter import names_of
from .checkpoint.computed import Tensor, renamed
from .checkpoint.experts import cut_experts, expert_names, is_fused, joined
from .checkpoint.source import Checkpoint
from .config import says_tied
from .errors import ArgumentError, MismatchError, shown
from .layers import is_end, is_output_head, unwrapped
from .match import by_prefix, carried, mapping_note, ruled


def matched(inputs: Mapping[str, Checkpoint], rules: Sequence[str]) -> dict[str, Checkpoint]:
    """Return the inputs with the tensors of sft and start under the base's names, as far as they are found there.

    Raises ArgumentError for a rule that changes no name, MismatchError for two tensors that become one.
    """
    base = inputs["base"]
    others = {role: each for role, each in inputs.items() if role != "base"}
    if rules:
        _check_rules(rules, base, others.values())
    return {"base": base} | {
        role: each if each.adapter is not None else _named(each, base, rules) for role, each in others.items()
    }


def _check_rules(rules: Sequence[str], base: Checkpoint, others: Iterable[Checkpoint]) -> None:
    names = [name for each in others for name in (each.tensors if each.adapter is None else names_of(each, base))]
    for rule in rules:
        before, names = names, ruled(names, [rule])
        if before == names:
            raise ArgumentError(
                f"--rename '{shown(rule)}' changes none of the {len(names)} tensor names of sft and start, such as"
                f" {shown(names[0]) if names else ''!r}"
            )


def _named(each: Checkpoint, base: Checkpoint, rules: Sequence[str]) -> Checkpoint:
    was = {name: name for name in each.tensors}  # what each name was in the file
    tensors: dict[str, Tensor] = dict(each.tensors)

    def move(pairs: Mapping[str, str]) -> None:
        """Give tensors new names, in their places."""
        nonlocal tensors, was
        new = [pairs.get(name, name) for name in tensors]
        if len({*new}) < len(new):
            twice = next(name for name, count in Counter(new).items() if count > 1)
            both = [was[name] for name in tensors if pairs.get(name, name) == twice]
            raise MismatchError(
                f"two tensors of {each.label} would be '{shown(twice)}' of {base.label}: '{shown(both[0])}' and"
                f" '{shown(both[1])}'; change --rename, or leave one of them out"
            )
        tensors = dict(zip(new, tensors.values(), strict=True))
        was = dict(zip(new, was.values(), strict=True))

    move(dict(zip(tensors, ruled(tensors, rules), strict=True)))
    lost = [name for name in tensors if name not in base.tensors]
    if lost:
        move({name: unwrapped(name) for name in lost})
        tensors, was = _experts(each, base, tensors, was)
        free = {name: tensor.shape for name, tensor in base.tensors.items() if name not in tensors}
        lost = [name for name in tensors if name not in base.tensors]
        tied = {name for name in lost if is_output_head(name) and says_tied(base.config)}  # the base needs not store it
        # Vocabularies of different sizes are not told here.
        ends = set(filter(is_end, lost))
        shapes = {name: None if name in ends else tensors[name].shape for name in lost if name not in tied}
        found = by_prefix(shapes, free)
        move(found | {name: new for name in tied if (new := carried(name, found)) is not None})
    changed = {name: old for name, old in was.items() if name != old}
    if not changed:
        return each
    return replace(
        each,
        tensors={name: renamed(t, name) for name, t in tensors.items()},
        was=changed,
        notes=(*each.notes, mapping_note(changed, each.label, base.label)),
    )


def _experts(
    each: Checkpoint, base: Checkpoint, tensors: dict[str, Tensor], was: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Cut fused experts into those of the base, or join single ones, as the base stores them."""
    lost = [name for name in tensors if name not in base.tensors]
    names = expert_names(base.tensors)
    if names is not None and any(map(is_fused, lost)):
        cut = {name: cut_experts(each.role, name, tensors[name], names) for name in lost}
        made = {new: (tensor, f"{was[old]}{place}") for old, parts in cut.items() for new, tensor, place in parts}
        gone = {old for old, parts in cut.items() if parts}
    elif any(map(is_fused, base.tensors)):
        made, gone = joined(each.role, tensors, lost, was)
    else:
        return tensors, was
    tensors = {name: tensor for name, tensor in tensors.items() if name not in gone}
    was = {name: old for name, old in was.items() if name not in gone}
    return tensors | {n: t for n, (t, _) in made.items()}, was | {n: old for n, (_, old) in made.items()}
