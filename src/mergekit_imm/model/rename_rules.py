"""Match tensor names of two models that differ by a user's rule, in spelling, or in a prefix."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..common.messages import shown
from ..common.notes import Note, note
from ..errors import ArgumentError
from .layout_names import canonical
from .tensor_names import blanked, folder_of

Shape = tuple[int, ...] | None  # None: unknown


def parse_rename(rule: str) -> tuple[re.Pattern[str], str]:
    """Return the pattern and the replacement of a rule REGEX=REPLACEMENT, split at the last =.

    >>> pattern, replacement = parse_rename("^model[.]language_model[.]=model.")
    >>> pattern.sub(replacement, "model.language_model.norm.weight")
    'model.norm.weight'
    """
    pattern, found, replacement = str(rule).rpartition("=")
    try:
        if not isinstance(rule, str):
            raise ValueError("give a string")
        if not found or not pattern:
            raise ValueError("write it as REGEX=REPLACEMENT")
        compiled = re.compile(pattern)
        compiled.sub(replacement, "")
        re.compile(f"(?:{pattern})|").sub(replacement, "")  # a wrong group is an error only if the pattern matches
    except (re.error, ValueError, IndexError) as error:
        raise ArgumentError(f"rename rule '{shown(rule)}' is not understood: {error}") from error
    return compiled, replacement


def apply_rules(names: Iterable[str], rules: Sequence[str]) -> list[str]:
    """Return names after the user's rules, applied one after the other."""
    parsed = [parse_rename(rule) for rule in rules]
    found = []
    for name in names:
        for pattern, replacement in parsed:
            name = pattern.sub(replacement, name)
        found.append(name)
    return found


def by_name(lost: Mapping[str, Shape], free: Mapping[str, Shape]) -> dict[str, str]:
    """Match names that differ in spelling, prefix, or both; return lost name -> free name, only certain matches.

    >>> by_name({"model.layers.0.mlp.router.weight": (4, 8)}, {"layers.0.block_sparse_moe.gate.weight": (4, 8)})
    {'model.layers.0.mlp.router.weight': 'layers.0.block_sparse_moe.gate.weight'}
    """
    found: dict[str, str] = {}
    for match in (by_folder, by_prefix, _by_spelling, _by_both, _by_parts):
        lost = {name: shape for name, shape in lost.items() if name not in found}
        taken = {*found.values()}
        found |= match(lost, {name: shape for name, shape in free.items() if name not in taken}) if lost else {}
    return found


def by_folder(lost: Mapping[str, Shape], free: Mapping[str, Shape]) -> dict[str, str]:
    """Match names of a part that lies in another folder of the other model, if all fit there and nowhere else.

    >>> by_folder({"conv_in.weight": (4,)}, {"unet/conv_in.weight": (4,), "vae/conv_in.weight": (8,)})
    {'conv_in.weight': 'unet/conv_in.weight'}
    """
    found: dict[str, str] = {}
    places = dict.fromkeys(map(folder_of, free))
    for folder in dict.fromkeys(map(folder_of, lost)):
        own = [name for name in lost if folder_of(name) == folder]
        moves = [{n: place + n.removeprefix(folder) for n in own} for place in places if place != folder]
        fits = [m for m in moves if all(new in free and _fits(lost[old], free[new]) for old, new in m.items())]
        if len(fits) == 1 and not {*fits[0].values()} & {*found.values()}:
            found |= fits[0]
    return found


def _by_spelling(lost: Mapping[str, Shape], free: Mapping[str, Shape]) -> dict[str, str]:
    ours, theirs = _by_canonical(lost), _by_canonical(free)
    pairs = {name: theirs[spelling] for spelling, name in ours.items() if spelling in theirs}
    return {one: other for one, other in pairs.items() if _fits(lost[one], free[other])}


def _by_both(lost: Mapping[str, Shape], free: Mapping[str, Shape]) -> dict[str, str]:
    ours, theirs = _by_canonical(lost), _by_canonical(free)
    pairs = by_prefix({s: lost[name] for s, name in ours.items()}, {s: free[name] for s, name in theirs.items()})
    return {ours[one]: theirs[other] for one, other in pairs.items()}


def _by_parts(lost: Mapping[str, Shape], free: Mapping[str, Shape]) -> dict[str, str]:
    """Match by prefixes that end in a shared component, so that each part can move by itself; all names or none."""
    ours, theirs = _by_canonical(lost), _by_canonical(free)
    if len(ours) < len(lost):
        return {}
    pairs = by_prefix({s: lost[n] for s, n in ours.items()}, {s: free[n] for s, n in theirs.items()}, shared=1)
    return {ours[one]: theirs[other] for one, other in pairs.items()} if len(pairs) == len(lost) else {}


def _by_canonical(names: Iterable[str]) -> dict[str, str]:
    """Return canonical spelling -> name, without spellings that several names share."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[canonical(name)].append(name)
    return {spelling: same[0] for spelling, same in found.items() if len(same) == 1}


def by_prefix(lost: Mapping[str, Shape], free: Mapping[str, Shape], *, shared: int = 0) -> dict[str, str]:
    """Match names that differ in a prefix; return lost name -> free name, only certain matches.

    One prefix may replace another if this takes every lost name that begins with it to a free name of the same shape,
    and no other prefix does. Numbers stay: layer 3 remains layer 3, and a prefix with a number stands for all layers. A
    prefix is the part before the longest suffix that two names share, plus the first `shared` components of the suffix.

    >>> by_prefix({"layers.3.mlp.w1.weight": (4,)}, {f"layers.{n}.moe.w1.weight": (4,) for n in range(4)})
    {'layers.3.mlp.w1.weight': 'layers.3.moe.w1.weight'}
    """
    suffixes: dict[str, list[str]] = defaultdict(list)
    if lost:
        for name in free:
            for suffix in _suffixes(name):
                suffixes[suffix].append(name)
    found: dict[str, str] = {}
    lost, left = {name: shape for name, shape in lost.items() if "*" not in name}, dict(free)
    while lost:
        rules = Counter[tuple[str, str]]()
        for name, shape in lost.items():
            rules.update(_rules(name, shape, suffixes, left, shared))
        valid = [rule for rule in sorted(rules) if _holds(*rule, lost, left)]
        certain = [rule for rule in valid if all(_agree(rule, other) for other in valid)]
        if not certain:
            break
        prefix, other = max(certain, key=lambda rule: (_count(rule[0], lost), -len(rule[0]), rule))
        for name in [name for name in lost if blanked(name).startswith(prefix)]:
            found[name] = _moved(name, prefix, other)
            del lost[name], left[found[name]]
    return found


def carried(name: str, pairs: Mapping[str, str]) -> str | None:
    """Return the new name of a name without a match, if all matched names with its prefix agree on it.

    >>> carried("m.lm_head.weight", {"m.model.embed.weight": "model.embed.weight"})
    'lm_head.weight'
    """
    rules = set()
    for old, new in pairs.items():
        one, other = _differing(old, new)
        if one and name.startswith(f"{'.'.join(one)}."):
            rules.add(".".join([*other, name.removeprefix(f"{'.'.join(one)}.")]))
    return rules.pop() if len(rules) == 1 else None


def rule_of(old: str, new: str) -> tuple[str, str]:
    """Return the prefix that one name has in place of the other's, with * for numbers; for `by_rule`.

    >>> rule_of("model.language_model.layers.3.w", "model.layers.3.w")
    ('model.language_model.', 'model.')
    """
    one, other = _differing(old, new)
    return tuple(blanked("".join(f"{part}." for part in each)) for each in (one, other))  # type: ignore[return-value]


def by_rule(name: str, rule: tuple[str, str]) -> str | None:
    """Return a name with the prefix of a rule replaced, numbers kept; None if the rule is not for this name.

    >>> by_rule("model.language_model.layers.3.w", ("model.language_model.", "model."))
    'model.layers.3.w'
    """
    return _moved(name, *rule) if blanked(name).startswith(rule[0]) else None


def _differing(old: str, new: str) -> tuple[list[str], list[str]]:
    """Split two names, and drop the components they share at the end."""
    one, other = old.split("."), new.split(".")
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return one, other


def _count(prefix: str, names: Iterable[str]) -> int:
    return sum(blanked(name).startswith(prefix) for name in names)


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


def _moved(name: str, prefix: str, other: str) -> str:
    """Replace the prefix of a name, and keep its numbers."""
    parts = name.split(".")
    count = prefix.count(".")
    numbers = iter(_numbers(".".join(parts[:count])))
    return ".".join([*(next(numbers, part) if part == "*" else part for part in other.split(".")[:-1]), *parts[count:]])


def _agree(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two rules give the same result for every name that both apply to."""
    short, long = sorted((one, other), key=lambda rule: len(rule[0]))
    return not long[0].startswith(short[0]) or long[1] == short[1] + long[0][len(short[0]) :]


def _suffixes(name: str) -> list[str]:
    """Suffixes of a name that identify a tensor, longest first, of at least two components."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(max(1, len(parts) - 1))]


def _rules(
    name: str, shape: Shape, suffixes: Mapping[str, list[str]], left: Mapping[str, Shape], shared: int
) -> set[tuple[str, str]]:
    """Pairs of prefixes, one in place of the other: the parts before the longest suffix shared with a free name."""
    for suffix in _suffixes(name):
        others = [other for other in suffixes.get(suffix, ()) if other in left and _fits(shape, left[other])]
        if others:
            rest = ".".join(suffix.split(".")[shared:]) if suffix.count(".") >= shared else suffix
            prefix = name[: len(name) - len(rest)]
            pairs = {(prefix, other[: len(other) - len(rest)]) for other in others}
            return {(blanked(one), blanked(two)) for one, two in pairs if _numbers(one) == _numbers(two)}
    return set()


def _fits(one: Shape, other: Shape) -> bool:
    return one is None or other is None or one == other


def _holds(prefix: str, other: str, lost: Mapping[str, Shape], left: Mapping[str, Shape]) -> bool:
    pairs = ((shape, _moved(name, prefix, other)) for name, shape in lost.items() if blanked(name).startswith(prefix))
    return all(target in left and _fits(shape, left[target]) for shape, target in pairs)


def mapping_note(original_names: Mapping[str, str], label: str, base: str) -> Note:
    """Return a note on how a model's names were mapped to the base's; `original_names`: the base's name -> its own."""
    rules = rules_of(original_names)
    listed = [f"{shown(old)} is {shown(new)} ({count})" for old, new, count in rules[:4]]
    more = f" and {len(rules) - 4} more rules (--dry-run lists them)" if len(rules) > 4 else ""
    return note(
        "names mapped",
        "{count} names of {label} differ from those of {base}: {rules}",
        count=len(original_names),
        label=label,
        base=base,
        rules=", ".join(listed) + more,
    )


def rules_of(original_names: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """Summarise how names were mapped: (pattern in the model, pattern in the base, number of tensors).

    >>> rules_of({"layers.0.w": "model.layers.0.w", "layers.1.w": "model.layers.1.w"})
    [('model.*', '*', 2)]
    """
    rules = Counter[tuple[str, str]]()
    for new, old in original_names.items():
        one, other = _differing(old, new)
        more = ".*" if len(one) < len(old.split(".")) else ""
        old, new = blanked(".".join(one)), blanked(".".join(other))
        rules[re.sub(r"\[\d+.*", "[*]", old) + more if old else "*", new + more if new else "*"] += 1
    return [(old, new, count) for (old, new), count in rules.items()]
