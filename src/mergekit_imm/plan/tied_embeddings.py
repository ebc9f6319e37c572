"""Tied tensors: which names stand for one tensor, and what breaks a tie.

The base decides: tensors of any name with the shape and bytes of its input embedding are tied, unless its config says
untied. An input may store any of the names; if it stores two different tensors it breaks the tie, and each is merged
under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor, is_stored
from ..common.messages import shown
from ..errors import CheckpointError
from ..model.config import Config, stated_tie, vocabulary_sizes
from ..model.tensor_names import (
    folder_of,
    is_embedding_or_head,
    is_input_embedding,
    is_output_head,
    layer_key,
    outer_bias,
    tied_key,
)
from ..numerics.dtypes import MERGED
from ..transforms.lora_config import MERGE_FIRST
from ..transforms.lora_tensor import WithRows

_SHARED, _OF_SHARED = "shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

SameBytes = Callable[[Checkpoint, Tensor, Tensor], bool]
Used = Mapping[str, Checkpoint]


@dataclass(frozen=True)
class Group:
    """Names that stand for one tensor in all inputs."""

    names: tuple[str, ...]  # merged as one, under `key`
    key: str
    written: tuple[str, ...]
    siblings: tuple[str, ...]  # all names that the base ties; the first stored one stands in for a missing name


@dataclass(frozen=True)
class Ties:
    """The ties of a merge."""

    groups: Mapping[str, Group] = field(default_factory=dict)  # by each name
    broken: str = ""  # what breaks the base's tie
    tied: Mapping[str, bool | None] = field(default_factory=dict)  # folder -> what its config must say


def tied_groups(used: Used, same_bytes: SameBytes) -> Ties:
    """Find the names that stand for one tensor, in each folder of the model by its own config."""
    base = used["base"]
    groups: dict[str, Group] = {}
    broken = ""
    tied: dict[str, bool | None] = {}
    shapes = _candidates(used)
    for folder in dict.fromkeys(map(folder_of, base.tensors)):
        config = base.config_of(folder)
        said = stated_tie(config)
        embeddings = _embeddings(base, folder, config, shapes)
        sizes = {base.tensors[name].shape for name in embeddings}
        several = [size for size in sizes if len(shapes[folder, size]) > 1]  # the others tie nothing
        own_heads = (_stores_another_head(base, shapes[folder, size], embeddings, same_bytes) for size in several)
        if said is None and any(own_heads):
            said = False  # the config is silent, the tensors are not
        tied[folder] = None if config is None or (stated_tie(config) is None and said is False) else said is not False
        found, breaker = _biases(used, folder, shapes, {size[0] for size in sizes}, same_bytes)
        groups |= found
        broken = broken or breaker
        apart = bool(breaker) and bool(tied[folder])
        ties_in_memory = (  # loaded, the config of a T5 says tied, even if it stores a head
            said is False
            and "t5" in str((config or {}).get("model_type"))
            and any(is_output_head(name) and folder_of(name) == folder for name in base.tensors)
        )
        for size in several:
            names = shapes[folder, size]
            own = [name for name in embeddings if base.tensors[name].shape == size]
            for members in _classes_of_base(used, own, names, said, same_bytes):
                if ties_in_memory:
                    _check_rows(used["sft"], base, members, ties_in_memory=True)
                found, breaker, heads_apart = _split(used, members, same_bytes)
                groups |= found
                broken = broken or breaker
                apart = apart or (heads_apart and bool(tied[folder]))
        if apart:
            tied[folder] = False
            groups |= _with_all_names({n: g for n, g in groups.items() if folder_of(n) == folder}, used["sft"])
    return Ties(groups, broken, tied)


Shapes = dict[tuple[str, tuple[int, ...]], list[str]]


def _candidates(used: Used) -> Shapes:
    """Return the vectors and matrices outside the layers, of all inputs, by folder and shape."""
    found: dict[tuple[str, tuple[int, ...]], dict[str, None]] = {}
    seen: dict[str, Tensor] = {}
    for each in used.values():
        before, seen = seen, each.tensors
        for name, tensor in seen.items():
            if before.get(name) is tensor:  # inputs stored alike share their tensors
                continue
            if 1 <= len(tensor.shape) <= 2 and tensor.dtype in MERGED and layer_key(name) is None:
                found.setdefault((folder_of(name), tensor.shape), {})[name] = None
    return {key: list(names) for key, names in found.items()}


def _embeddings(base: Checkpoint, folder: str, config: Config | None, shapes: Shapes) -> list[str]:
    """Return the base's input embeddings in a folder: by name, else by their rows, else its heads."""
    sizes = vocabulary_sizes(config)
    matrices = sorted(
        name
        for (where, shape), names in shapes.items()
        if where == folder and len(shape) == 2
        for name in names
        if (own := base.tensors.get(name)) and own.shape == shape and own.dtype in MERGED
        if is_embedding_or_head(name) or shape[0] in sizes
    )
    return (
        [name for name in matrices if is_input_embedding(name)]
        or [name for name in matrices if not is_output_head(name)]
        or matrices
    )


def _stores_another_head(base: Checkpoint, names: Sequence[str], embeddings: list[str], same: SameBytes) -> bool:
    """Whether the base stores a head that equals none of its embeddings."""
    heads = [name for name in names if name in base.tensors and is_output_head(name) and _owner(name, embeddings)]
    return any(not any(same(base, base.tensors[e], base.tensors[head]) for e in embeddings) for head in heads)


def _owner(name: str, embeddings: Sequence[str]) -> str:
    """Return the embedding of a head's sub-model: for `expert.lm_head` one under `expert.`; "" if there is none."""
    above = name[: name.rfind(".", 0, -len(".weight")) + 1] or folder_of(name)
    return next((each for each in embeddings if each.startswith(above)), "")


def _classes_of_base(
    used: Used, embeddings: list[str], names: Sequence[str], said: bool | None, same_bytes: SameBytes
) -> list[list[str]]:
    """Return the classes of tied names of one shape: those of the base, with the other inputs' names for them."""
    base = used["base"]
    named = [name for name in names if said is not False or is_input_embedding(name)]
    classes = _equal_classes(base, _ordered(name for name in named if name in base.tensors), same_bytes)
    tied = [members for members in classes if {*members} & {*embeddings}]
    rest = [name for name in named if not any(name in members for members in tied)]
    whole = [each for each in used.values() if each.adapter is None]
    for name in rest:
        # Unless the config says untied, heads are tied by name too, whether or not the base stores them.
        is_head = is_output_head(name) and base.config_of(folder_of(name)) is not None
        owner = _owner(name, embeddings) if is_head else ""
        if name not in base.tensors and len(tied) == 1 and (is_head or is_input_embedding(name)):
            owner = owner or tied[0][0]
        for members in tied:
            if owner in members or (
                name not in base.tensors and any(_equals(each, name, members, same_bytes) for each in whole)
            ):
                members.append(name)
                break
    return [_ordered(members) for members in tied if len(members) > 1]


def _equals(checkpoint: Checkpoint, name: str, members: Sequence[str], same_bytes: SameBytes) -> bool:
    """Whether a model stores the same bytes under a name as under a tied one."""
    own = checkpoint.tensors.get(name)
    held = next((checkpoint.tensors[member] for member in members if member in checkpoint.tensors), None)
    return own is not None and held is not None and same_bytes(checkpoint, held, own)


def _with_all_names(found: Mapping[str, Group], sft: Checkpoint) -> dict[str, Group]:
    """Write tied tensors under all their names, since an untied config ties none of them any more.

    The same holds for an embedding that encoder and decoder share, under names that no file need store. Raises
    CheckpointError for an adapter that trained a copy of it, which neither reads.
    """
    groups = {
        name: replace(group, written=(*group.written, *(n for n in group.names if n not in group.written)))
        for name, group in found.items()
    }
    shared = next((name for name in groups if name.endswith(_SHARED)), None)
    if shared is None:
        return groups
    if sft.adapter is not None and shared in sft.tensors:
        raise CheckpointError(
            f"{sft.label} holds '{shown(shared)}', trained apart from the embeddings of encoder and decoder, which are"
            f" tied to it; {MERGE_FIRST}"
        )
    prefix, group = shared.removesuffix(_SHARED), groups[shared]
    more = tuple(name for end in _OF_SHARED if (name := prefix + end) not in groups)
    return groups | dict.fromkeys(group.names, replace(group, written=(*group.written, *more)))


def _biases(
    used: Used, folder: str, shapes: Shapes, rows: Collection[int], same_bytes: SameBytes
) -> tuple[dict[str, Group], str]:
    """Return the groups of head biases that the base stores under two names, and what breaks their tie.

    The names are such as `lm_head.bias` and `lm_head.decoder.bias`, as in BERT.
    """
    base = used["base"]
    groups: dict[str, Group] = {}
    broken = ""
    for names in (shapes.get((folder, (size,)), []) for size in sorted(rows)):
        for pair in ([outer_bias(name), name] for name in names if outer_bias(name) in names):
            stored = [name for name in pair if name in base.tensors]
            if len(_equal_classes(base, stored, same_bytes)) == 1:
                found, breaker, _ = _split(used, pair, same_bytes)
                groups |= found
                broken = broken or breaker
    return groups, broken


def _split(used: Used, members: list[str], same_bytes: SameBytes) -> tuple[dict[str, Group], str, bool]:
    """Return the groups of names tied in every input, what splits them, and whether a head is split off."""
    if not all(any(name in each.tensors for name in members) for each in used.values() if each.adapter is None):
        return {}, "", False  # an input has none of the names: an error, but not about ties
    partition, breaker = [list(members)], ""
    model = used.get("start", used["base"])  # what an adapter was trained on
    for each in sorted(used.values(), key=lambda each: each.adapter is not None):
        found = [classes for names in partition if (classes := _classes_of(each, names, members, same_bytes))]
        apart = next((classes for classes in found if len(classes) > 1), None)
        if apart is not None and not breaker:
            though = "its config ties them" if each is used["base"] else "the base ties them"
            breaker = _broken_by(each, apart[0][0], apart[1][0], though)
        if apart is not None and each is model:
            _check_rows(used["sft"], model, members)
        partition = [names for classes in found for names in classes]
    groups: dict[str, Group] = {}
    for names in partition:
        holders = [used["base"], *used.values()]
        written = next(held for each in holders if (held := [name for name in names if name in each.tensors]))
        groups |= dict.fromkeys(names, Group(tuple(names), tied_key(written), tuple(written), tuple(members)))
    with_embedding = [names for names in partition if any(map(is_input_embedding, names))] or partition[:1]
    return groups, breaker, len(with_embedding) < len(partition)


def _classes_of(
    checkpoint: Checkpoint, names: list[str], members: Sequence[str], same_bytes: SameBytes
) -> list[list[str]]:
    """Split names into classes of one tensor in an input; a name it does not store belongs to the first it has."""
    if checkpoint.adapter is not None:
        return _classes_of_adapter(checkpoint, names, same_bytes)
    first = next(name for name in members if name in checkpoint.tensors)
    held = [name for name in names if name in checkpoint.tensors]
    classes = _equal_classes(checkpoint, [first, *(name for name in held if name != first)], same_bytes)
    classes[0] = [name for name in names if name in classes[0] or name not in checkpoint.tensors]
    return [found for found in classes if found]


def _classes_of_adapter(adapter: Checkpoint, members: list[str], same_bytes: SameBytes) -> list[list[str]]:
    """Split tied names into classes that an adapter trained as one tensor.

    Factors or rows for either name change the one tensor, as in PEFT; so do equal rows for both. A module trained
    whole is a copy; names that the adapter lacks are unchanged.
    """
    held = {name: adapter.tensors[name] for name in members if name in adapter.tensors}
    whole = [name for name, tensor in held.items() if is_stored(tensor)]
    if len(whole) < len(held):
        one, *others = held.values()
        if others and (
            any(tensor.is_delta for tensor in held.values())
            or not all(same_bytes(adapter, one, other) for other in others)
        ):
            both = " and ".join(f"'{shown(name)}'" for name in sorted(held))
            raise CheckpointError(f"{adapter.label} changes {both}, which are one tensor; {MERGE_FIRST}")
        return [members]
    left = [name for name in members if name not in held]
    if any(name.endswith(".bias") and not _is_copy(adapter, name) for name in whole):
        return [members]  # a bias is trained in place, beside the factors of its weight
    classes = _equal_classes(adapter, whole, same_bytes)
    tied = next(
        (each for each in classes if any(map(is_input_embedding, each)) and any(map(is_output_head, each))), None
    )
    if tied is not None:  # it trained or resized the tied tensor: the other names go with it
        tied += left
        return classes
    return [each for each in (*classes, left) if each]


def _is_copy(adapter: Checkpoint, bias: str) -> bool:
    """Whether an adapter holds the whole module of a bias, which PEFT copied to train it."""
    weight = adapter.tensors.get(f"{bias.removesuffix('bias')}weight")
    return weight is not None and is_stored(weight)


def _check_rows(
    adapter: Checkpoint, model: Checkpoint, members: Sequence[str], *, ties_in_memory: bool = False
) -> None:
    """Refuse trained rows of a tensor that the config ties but the model stores apart: PEFT may change both.

    `ties_in_memory`: the config of a T5 says tied once it is loaded, whatever its file says.
    """
    rows = next((name for name in members if isinstance(adapter.tensors.get(name), WithRows)), None)
    if rows is not None and (ties_in_memory or stated_tie(model.config_of(folder_of(rows))) is not False):
        raise CheckpointError(
            f"{adapter.label} changes rows of '{shown(rows)}', which the config of {model.label} ties to a tensor"
            f" stored apart: whether both change is not stored; {MERGE_FIRST}"
        )


def _equal_classes(checkpoint: Checkpoint, names: Sequence[str], same_bytes: SameBytes) -> list[list[str]]:
    """Split names into classes with equal bytes."""
    classes: list[list[str]] = []
    for name in names:
        for known in classes:
            if same_bytes(checkpoint, checkpoint.tensors[known[0]], checkpoint.tensors[name]):
                known.append(name)
                break
        else:
            classes.append([name])
    return classes


def _ordered(names: Iterable[str]) -> list[str]:
    """Sort names, embeddings first: a head that is not stored means the embedding."""
    return sorted(names, key=lambda name: (not is_input_embedding(name), name))


def _broken_by(checkpoint: Checkpoint, one: str, other: str, though: str) -> str:
    if checkpoint.adapter is not None:
        held = one if one in checkpoint.tensors else other
        return f"{checkpoint.label} holds '{shown(held)}', trained apart, though the base ties it"
    return f"{checkpoint.label} holds '{shown(one)}' and '{shown(other)}' with different values, though {though}"
