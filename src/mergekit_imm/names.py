"""Names that differ between models: which tensor of one is which of the base.

A name that is the base's is never mapped. For the others are tried, in this order: the user's rules, wrappers left
out, fused experts cut or joined as the base has them, and one prefix in the place of another.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .checkpoint.computed import Piece, Pieces, Tensor, renamed, sliced
from .checkpoint.source import Checkpoint
from .config import says_tied
from .errors import ArgumentError, MismatchError, shown
from .layers import is_output_head, unwrapped
from .recipe import parse_rename

Shape = tuple[int, ...] | None  # None: not known

# What experts are called that are stored one by one, first and second half of `gate_up_proj`, and `down_proj`.
_EXPERT_NAMES = (("gate_proj.weight", "up_proj.weight", "down_proj.weight"), ("w1.weight", "w3.weight", "w2.weight"))
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
_FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)(\.weight)?")


def matched(inputs: Mapping[str, Checkpoint], rules: Sequence[str]) -> dict[str, Checkpoint]:
    """Return the inputs with the tensors of sft and start under the base's names, as far as they are found there.

    Raises ArgumentError for a rule that changes no name, MismatchError for two tensors that become one.
    """
    base = inputs["base"]
    others = {role: each for role, each in inputs.items() if role != "base"}
    _check_rules(rules, others.values())
    return {"base": base} | {
        role: each if each.adapter is not None else _named(each, base, rules) for role, each in others.items()
    }


def _check_rules(rules: Sequence[str], others: Iterable[Checkpoint]) -> None:
    names = [unwrapped(name) if each.adapter is not None else name for each in others for name in each.tensors]
    for rule in rules:
        before, names = names, ruled(names, [rule])
        if before == names:
            raise ArgumentError(
                f"--rename '{shown(rule)}' changes none of the {len(names)} tensor names of sft and start, such as"
                f" {shown(names[0]) if names else ''!r}"
            )


def ruled(names: Iterable[str], rules: Sequence[str]) -> list[str]:
    """Return names as the user's rules make them, one rule after the other."""
    parsed = [parse_rename(rule) for rule in rules]
    found = []
    for name in names:
        for pattern, replacement in parsed:
            name = pattern.sub(replacement, name)
        found.append(name)
    return found


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
        move(by_prefix({name: tensors[name].shape for name in lost if name not in tied}, free))
    changed = {name: old for name, old in was.items() if name != old}
    if not changed:
        return each
    return replace(each, tensors={name: renamed(t, name) for name, t in tensors.items()}, was=changed)


def by_prefix(lost: Mapping[str, Shape], free: Mapping[str, Shape]) -> dict[str, str]:
    """Match names that differ in their prefix: lost name -> free name, for those that are certain.

    One prefix stands for another if that takes every lost name that begins with it to a free one of the same shape,
    and if no other prefix does. Numbers are no part of a prefix: layer 3 is layer 3 everywhere.
    """
    ends: dict[str, list[str]] = defaultdict(list)
    if lost:
        for name in free:
            for end in _ends(name):
                ends[end].append(name)
    found: dict[str, str] = {}
    lost, left = dict(lost), dict(free)
    while lost:
        rules = Counter[tuple[str, str]]()
        for name, shape in lost.items():
            rules.update(_rules(name, shape, ends, left))
        valid = [rule for rule in sorted(rules) if _holds(*rule, lost, left)]
        certain = [rule for rule in valid if all(_agree(rule, other) for other in valid)]
        if not certain:
            break
        prefix, other = max(certain, key=lambda rule: (_count(rule[0], lost), -len(rule[0]), rule))
        for name in [name for name in lost if name.startswith(prefix)]:
            found[name] = other + name[len(prefix) :]
            del lost[name], left[found[name]]
    return found


def _count(prefix: str, names: Iterable[str]) -> int:
    return sum(name.startswith(prefix) for name in names)


def _agree(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two rules take the names that both are about to the same places."""
    short, long = sorted((one, other), key=lambda rule: len(rule[0]))
    return not long[0].startswith(short[0]) or long[1] == short[1] + long[0][len(short[0]) :]


def _ends(name: str) -> list[str]:
    """The ends of a name that tell a tensor, longest first: two components at least."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(max(1, len(parts) - 1))]


def _rules(name: str, shape: Shape, ends: Mapping[str, list[str]], left: Mapping[str, Shape]) -> set[tuple[str, str]]:
    """Prefixes of which one may stand for the other: what is before the longest end shared with a free name."""
    for end in _ends(name):
        others = [other for other in ends.get(end, ()) if other in left and _fits(shape, left[other])]
        if others:
            prefix = name[: len(name) - len(end)]
            pairs = {(prefix, other[: len(other) - len(end)]) for other in others}
            return {pair for pair in pairs if not any(part.isdigit() for side in pair for part in side.split("."))}
    return set()


def _fits(one: Shape, other: Shape) -> bool:
    return one is None or other is None or one == other


def _holds(prefix: str, other: str, lost: Mapping[str, Shape], left: Mapping[str, Shape]) -> bool:
    pairs = ((shape, other + name[len(prefix) :]) for name, shape in lost.items() if name.startswith(prefix))
    return all(target in left and _fits(shape, left[target]) for shape, target in pairs)


# --- experts


def _experts(
    each: Checkpoint, base: Checkpoint, tensors: dict[str, Tensor], was: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Cut fused experts into those of the base, or join single ones, as the base stores them."""
    lost = [name for name in tensors if name not in base.tensors]
    names = expert_names(base.tensors)
    if names is not None and any(map(_FUSED.fullmatch, lost)):
        pairs = [cut for name in lost if (cut := cut_experts(each.role, name, tensors[name], names))]
        made = {new: (tensor, f"{was[old]}{place}") for old, parts in pairs for new, tensor, place in parts}
        gone = {old for old, _ in pairs}
    elif any(map(_FUSED.fullmatch, base.tensors)):
        made, gone = _joined(each.role, tensors, lost, was)
    else:
        return tensors, was
    tensors = {name: tensor for name, tensor in tensors.items() if name not in gone}
    was = {name: old for name, old in was.items() if name not in gone}
    return tensors | {n: t for n, (t, _) in made.items()}, was | {n: old for n, (_, old) in made.items()}


def expert_names(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Return what a model that stores its experts one by one calls the tensors of one; None if it does not."""
    ends = {found[3] for found in map(_EXPERT.fullmatch, names) if found}
    return next((names for names in _EXPERT_NAMES if {*names} <= ends), None)


def cut_experts(
    role: str, name: str, tensor: Tensor, names: tuple[str, str, str]
) -> tuple[str, list[tuple[str, Tensor, str]]] | None:
    """Cut a fused tensor of experts: (its name, [(name of a part, the part, which it is)]); None if it is none.

        gate_up_proj[e] = [gate_proj of expert e; up_proj of expert e],  down_proj[e] = down_proj of expert e

    with shapes [experts, 2 x inner, hidden] and [experts, hidden, inner], as transformers 5 fuses them.
    """
    found = _FUSED.fullmatch(name)
    if found is None or len(tensor.shape) != 3:
        return None
    path, which, _ = found.groups()
    ends = names[:2] if which == "gate_up_proj" else names[2:]
    experts, rows, columns = tensor.shape
    if rows % len(ends):
        return None
    height = rows // len(ends)
    parts = []
    for expert in range(experts):
        for number, end in enumerate(ends):
            part = f"{path}.{expert}.{end}"
            first = (expert * rows + number * height) * columns
            place = f"[{expert}, {number * height}:{(number + 1) * height}]" if len(ends) > 1 else f"[{expert}]"
            parts.append((part, sliced(tensor, role, part, first, (height, columns)), place))
    return name, parts


def _joined(
    role: str, tensors: Mapping[str, Tensor], lost: Iterable[str], was: Mapping[str, str]
) -> tuple[dict[str, tuple[Tensor, str]], set[str]]:
    """Put single experts together where all are there: name -> (tensor, what it was), and the names it was made of."""
    stacks: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for name in lost:
        found = _EXPERT.fullmatch(name)
        if found is not None:
            stacks[found[1]][int(found[2]), found[3]] = name
    made: dict[str, tuple[Tensor, str]] = {}
    gone: set[str] = set()
    for path, members in stacks.items():
        for gate, up, down in _EXPERT_NAMES:
            for ends, which in (((gate, up), "gate_up_proj"), ((down,), "down_proj")):
                count = sum(end == ends[0] for _, end in members)
                parts = [(e, n, members.get((e, end))) for e in range(count) for n, end in enumerate(ends)]
                names = [name for _, _, name in parts if name is not None]
                shapes = {tensors[name].shape for name in names}
                if not count or len(names) < len(parts) or len(shapes) > 1 or len(shape := shapes.pop()) != 2:
                    continue
                pieces = tuple(
                    Piece(role, sliced(tensors[name], role, name, 0, (1, *shape)), (e, n * shape[0], 0))
                    for (e, n, _), name in zip(parts, names, strict=True)
                )
                fused = f"{path}.{which}"
                made[fused] = (
                    Pieces(fused, (count, len(ends) * shape[0], shape[1]), pieces),
                    f"{was[names[0]].replace('.0.', '.*.')} of {count} experts",
                )
                gone |= {*names}
    return made, gone


def mapping_note(each: Checkpoint, base: Checkpoint) -> str:
    """Say in one line which names of a model were taken for which of the base."""
    rules = rules_of(each)
    told = [f"{shown(old)} is {shown(new)} ({count})" for old, new, count in rules[:4]]
    more = f" and {len(rules) - 4} more rules (--dry-run lists them)" if len(rules) > 4 else ""
    return f"note: {len(each.was)} names of {each.label} differ from those of {base.label}: {', '.join(told)}{more}"


def rules_of(each: Checkpoint) -> list[tuple[str, str, int]]:
    """Sum up how names of a model were mapped: (in the model, in the base, of how many tensors)."""
    rules = Counter[tuple[str, str]]()
    for new, old in each.was.items():
        one, other = old.split("."), new.split(".")
        while one and other and one[-1] == other[-1]:
            one, other = one[:-1], other[:-1]
        more = ".*" if len(one) < len(old.split(".")) else ""
        old, new = (".".join("*" if part.isdigit() else part for part in side) for side in (one, other))
        rules[re.sub(r"\[\d+.*", "[…]", old) + more if old else "*", new + more if new else "*"] += 1
    return [(old, new, count) for (old, new), count in rules.items()]
