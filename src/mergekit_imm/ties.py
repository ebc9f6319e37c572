"""Tied embeddings: which names of the inputs mean one tensor, and what breaks a tie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .checkpoint.computed import Tensor, is_delta, is_stored
from .checkpoint.source import Checkpoint
from .checkpoint.tensorfile import MERGED
from .config import mentions_tie, says_tied
from .errors import CheckpointError, shown
from .layers import is_end, is_input_embedding, is_output_head, layer_key, tied_key

SameBytes = Callable[[Checkpoint, Tensor, Tensor], bool]


@dataclass(frozen=True)
class Group:
    """Names that mean one tensor in the base; once an input breaks the tie, each is a group of its own."""

    names: tuple[str, ...]  # merged as one, under `key`
    key: str
    written: tuple[str, ...]
    siblings: tuple[str, ...]  # all names of the tie, broken or not


def tied_groups(used: Mapping[str, Checkpoint], same_bytes: SameBytes) -> tuple[dict[str, Group], str, bool | None]:
    """Find the names that the base's config ties: name -> group, what breaks the tie, and what a config must say."""
    models = {role: each for role, each in used.items() if each.adapter is None}
    adapters = [each for each in used.values() if each.adapter is not None]
    groups, broken, tied = _groups_of_models(models, adapters, same_bytes)
    for adapter in adapters:
        for group in {id(group): group for group in groups.values() if len(group.names) > 1}.values():
            breaker = _broken_by_adapter(group, adapter, same_bytes)
            if breaker:
                broken, tied = broken or breaker, False
                groups |= {name: Group((name,), name, (name,), group.names) for name in group.names}
    return groups, broken, tied


def _broken_by_adapter(group: Group, adapter: Checkpoint, same_bytes: SameBytes) -> str:
    """Say how an adapter makes two tensors of one; nothing if it does not.

    Factors and rows for either name change the one tensor, as PEFT merges them, and the same rows for both, too. A
    module trained whole is a copy.
    """
    held = {name: adapter.tensors[name] for name in group.names if name in adapter.tensors}
    changed = {name: tensor for name, tensor in held.items() if is_stored(tensor)}
    parts = [name for name, tensor in held.items() if not is_stored(tensor)]
    if parts and len(held) > 1:
        one, *others = held.values()
        if not any(map(is_delta, held.values())) and all(same_bytes(adapter, one, other) for other in others):
            return ""
        raise CheckpointError(
            f"{adapter.label} changes '{shown(group.names[0])}' and '{shown(group.names[1])}', which are one tensor;"
            " merge it first: peft's `merge_and_unload()`, then `save_pretrained`"
        )
    if parts or not changed:
        return ""
    one, *others = changed.values()
    if len(changed) == len(group.names) and all(same_bytes(adapter, one, other) for other in others):
        return ""
    return f"{adapter.label} holds '{shown(next(iter(changed)))}', trained apart, though the base ties it"


def _groups_of_models(
    used: Mapping[str, Checkpoint], adapters: Sequence[Checkpoint], same_bytes: SameBytes
) -> tuple[dict[str, Group], str, bool | None]:
    base = used["base"]
    if not says_tied(base.config):
        return {}, "", None if base.config is None else False
    ends: dict[tuple[int, ...], set[str]] = {}
    for each in (*used.values(), *adapters):
        for name, tensor in each.tensors.items():
            if is_end(name) and layer_key(name) is None and tensor.dtype in MERGED:
                ends.setdefault(tensor.shape, set()).add(name)
    groups: dict[str, Group] = {}
    broken = ""
    for found in ends.values():
        embeddings = {name for name in found if is_input_embedding(name)}
        # A head belongs to an embedding of its own sub-model: that of `expert.lm_head` is below `expert.`
        heads = {n for n in found - embeddings if any(e.startswith(n[: n.rfind(".", 0, -7) + 1]) for e in embeddings)}
        names = sorted(embeddings | heads)
        if not names or not all(any(name in each.tensors for name in names) for each in used.values()):
            continue  # a name is missing altogether: an error, but not about ties
        classes = _equal_classes(base, [name for name in names if name in base.tensors], same_bytes)
        if len(classes) > 1 and any(all(map(is_output_head, each)) for each in classes):
            if not mentions_tie(base.config):
                return {}, "", None  # what its config does not say, its tensors do: they are not tied
            broken = _breaks(base, classes[0][0], classes[1][0], "its config ties them")
            groups |= {name: Group((name,), name, (name,), tuple(names)) for name in names}
            continue
        for members in [names] if len(classes) == 1 else classes:
            held = {role: [n for n in members if n in each.tensors] for role, each in used.items()}
            if len(members) < 2 or not all(held.values()) or not any(map(is_input_embedding, members)):
                continue
            split = {role: _equal_classes(each, held[role], same_bytes) for role, each in used.items()}
            breaker = next((role for role, parts in split.items() if len(parts) > 1), None)
            if breaker is None:
                group = Group(tuple(members), tied_key(held["base"]), tuple(held["base"]), tuple(members))
                groups |= dict.fromkeys(members, group)
            else:
                one, other = split[breaker][0][0], split[breaker][1][0]
                broken = broken or _breaks(used[breaker], one, other, "the base ties them")
                groups |= {name: Group((name,), name, (name,), tuple(members)) for name in members}
    return groups, broken, not broken


def _equal_classes(each: Checkpoint, names: list[str], same_bytes: SameBytes) -> list[list[str]]:
    """Sort names of a checkpoint into those that hold the same bytes."""
    classes: list[list[str]] = []
    for name in names:
        for known in classes:
            if same_bytes(each, each.tensors[known[0]], each.tensors[name]):
                known.append(name)
                break
        else:
            classes.append([name])
    return classes


def _breaks(each: Checkpoint, one: str, other: str, though: str) -> str:
    return f"{each.label} holds '{shown(one)}' and '{shown(other)}' with different values, though {though}"
