"""Models with vocabularies of different sizes: the rows that all have, and the rest of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Extended, Piece, Tensor, is_delta, sliced
from ..checkpoint.safetensors_file import MERGED
from ..common.messages import shown
from ..errors import CheckpointError, MismatchError
from ..model.config import says_tied
from ..model.tensor_names import is_end, layer_key, ready_option
from ..options.recipe import Parameters
from .tokenizer_files import check_tokens

Inputs = Mapping[str, Checkpoint]


def resized(inputs: Inputs, parameters: Parameters) -> dict[str, Checkpoint]:
    """Return the inputs with one vocabulary, whose the parameters say: base's or sft's; as they are if neither.

    A tensor with a row for each token gets that model's number of rows: what is too much is cut off; where rows lack,
    those of that model follow, as an `Extended` with the rows that all have as its own. With the base's vocabulary
    the sft's side files are left out. Raises MismatchError if an id means different tokens, if tensors do not follow
    one vocabulary, CheckpointError if the tokens cannot be compared.
    """
    if parameters.vocab == "strict":
        return dict(inputs)
    used = {role: each for role, each in inputs.items() if role != "start" or parameters.reference == "start"}
    base, sft = used["base"], used["sft"]
    rows = _rows(used)
    ends = _embeddings_and_heads(base)
    notes = []
    if ends:
        whole = ready_option("--take", *ends)
        cure = f"rows of different tokens are not merged: leave out --vocab, and take them whole from the sft: {whole}"
        most = max(tensor.shape[0] for tensor in ends.values())
        for each in (used[role] for role in ("sft", "start") if role in used):
            common = min(rows[each.role], rows["base"]) if rows else most
            notes.append(check_tokens(base, each, common, cure))
    else:
        notes.append(f"note: {base.label} has no embedding by a name that is known; --vocab chooses other files only")
    found = dict(inputs)
    if rows:
        found |= _with_rows(used, rows, parameters.vocab)
        notes += _notes(used, rows, parameters.vocab)
    found["base"] = replace(found["base"], notes=tuple(filter(None, notes)))
    if parameters.vocab == "base":
        left_out = tuple(sorted({*sft.left_out, *sft.side}))
        found["sft"] = replace(found["sft"], side={}, left_out=left_out)
    return found


def _notes(used: Inputs, rows: Mapping[str, int], owner: str) -> list[str]:
    size, common = rows[owner], min(rows.values())
    notes = []
    if size > common:
        lacking = next(used[role].label for role in rows if rows[role] == common)
        notes.append(
            f"note: the vocabulary is that of {used[owner].label}, {size} rows; {common} are merged, and the"
            f" {size - common} that {lacking} lacks are taken from there"
        )
    notes += [
        f"note: {rows[role] - size} rows that {used[role].label} has beyond the {size} of {used[owner].label} are not"
        f" in the result (--vocab {owner})"
        for role in ("base", "sft")
        if rows[role] > size
    ]
    return notes


def _embeddings_and_heads(each: Checkpoint) -> dict[str, Tensor]:
    """The embeddings and heads of a model, which have a row for each token."""
    return {
        name: tensor
        for name, tensor in each.tensors.items()
        if is_end(name)
        and layer_key(name) is None
        and tensor.dtype in MERGED
        and len(tensor.shape) == 2
        and tensor.count
    }


def _rows(used: Inputs) -> dict[str, int]:
    """Return how many rows each model has, by its role; nothing if all have as many."""
    base = used["base"]
    pairs: dict[str, set[tuple[int, int]]] = {}
    for role, each in used.items():
        ends = _embeddings_and_heads(each)
        for name, own in _embeddings_and_heads(base).items():
            tensor = ends.get(name)
            if tensor is None and says_tied(base.config):
                tensor = next((t for t in ends.values() if t.shape[1:] == own.shape[1:]), None)
            if tensor is not None and tensor.shape[1:] == own.shape[1:]:
                pairs.setdefault(role, set()).add((own.shape[0], tensor.shape[0]))
    differing = {pair[0] for found in pairs.values() for pair in found if pair[0] != pair[1]}
    if not differing:
        return {}
    counts = {role: {there for here, there in found if here in differing} for role, found in pairs.items()}
    for role, found in counts.items():
        if len(found) > 1 or len(differing) > 1:
            raise MismatchError(
                f"the embeddings and heads of {base.label} and {used[role].label} have {sorted(differing)} and"
                f" {sorted(found)} rows; --vocab needs one number of rows in each model: resize them alike"
            )
    rows = {role: found.pop() for role, found in counts.items() if found}
    # What an adapter does not hold is as in the model it was trained on.
    return {role: rows.get(role, rows.get("start", rows["base"])) for role in used}


def _with_rows(used: Inputs, rows: Mapping[str, int], owner: str) -> dict[str, Checkpoint]:
    """Return the models with the owner's number of rows in every tensor that has a row for each token."""
    names = _names(used, rows)
    found = {}
    for role, each in used.items():
        tensors = dict(each.tensors)
        for name in names & set(tensors):
            tensors[name] = _with_rows_of(name, role, used, rows, owner)
        found[role] = replace(each, tensors=tensors, rows=(rows[role], rows[owner]))
    return found


def _names(used: Inputs, rows: Mapping[str, int]) -> set[str]:
    """The names of the tensors that have a row for each token: the ends, and what differs just as they do."""
    base = used["base"]
    names = {name for name, tensor in _embeddings_and_heads(base).items() if tensor.shape[0] == rows["base"]}
    if used["sft"].adapter is not None and rows["sft"] != rows["base"]:
        # An adapter holds no bias of logits, which its model was given another of.
        names |= {name for name, tensor in base.tensors.items() if tensor.shape == (1, rows["base"])}
    for role, each in used.items():
        if says_tied(base.config):  # each may store its own of the tied names
            names |= {
                name for name, tensor in _embeddings_and_heads(each).items() if tensor.shape[0] == rows[role]
            } - set(base.tensors)
        if rows[role] != rows["base"]:
            names |= {
                name
                for name, tensor in each.tensors.items()
                if name in base.tensors
                and any(
                    tensor.shape == _resized(base.tensors[name].shape, rows["base"], rows[role], axis)
                    for axis in (0, 1)
                )
            }
    return names


def _with_rows_of(name: str, role: str, used: Inputs, rows: Mapping[str, int], owner: str) -> Tensor:
    tensor = used[role].tensors[name]
    origin, whole = _whole(name, used, owner)
    size, common = rows[owner], min(rows.values())
    # A single row of columns is a bias of logits, as BART has it, unless the rows of the two models differ in number.
    axis = 1 if whole.shape == (1, size) and tensor.shape == (1, rows[role]) else 0

    def shaped(count: int) -> tuple[int, ...]:
        return (1, count) if axis else (count, *whole.shape[1:])

    for each, there in ((role, tensor), (owner, whole)):
        if there.shape != shaped(rows[each]) or there.dtype not in MERGED:
            raise MismatchError(
                f"tensor '{shown(name)}' is {there.dtype} {list(there.shape)} in {used[each].label}, whose vocabulary"
                f" has {rows[each]} rows; with --vocab all tensors of a vocabulary are resized: resize it too, or merge"
                " without --vocab"
            )
    if role == owner:
        return tensor
    columns = whole.count // size
    own = sliced(tensor, role, name, 0, shaped(common)) if rows[role] > common else tensor
    if size == common:
        return own
    if is_delta(whole):
        raise CheckpointError(
            f"{used[owner].label} changes tensor '{shown(name)}' by factors, also rows that"
            f" {used['base'].label} lacks; merge it first: peft's `merge_and_unload()`, then `save_pretrained`"
        )
    rest = sliced(whole, origin, name, common * columns, shaped(size - common))
    corner = [0] * len(whole.shape)
    behind = [*corner[:axis], common, *corner[axis + 1 :]]
    return Extended(name, whole.shape, (Piece(role, own, tuple(corner)), Piece(origin, rest, tuple(behind))))


def _resized(shape: tuple[int, ...], before: int, after: int, axis: int) -> tuple[int, ...] | None:
    """A shape with another number of rows, or of columns of a single row; None if it has not as many."""
    if axis:
        return (1, after) if shape == (1, before) else None
    return (after, *shape[1:]) if shape[:1] == (before,) else None


def _whole(name: str, used: Inputs, owner: str) -> tuple[str, Tensor]:
    """The tensor whose rows a result has, and the model it is in: a tied one by any of its names."""
    roles = [owner]
    if used[owner].adapter is not None:
        roles.append("start" if "start" in used else "base")
    for role in roles:
        each = used[role]
        tied = (
            _embeddings_and_heads(each).values()
            if name in _all_embeddings_and_heads(used) and says_tied(used["base"].config)
            else ()
        )
        found = each.tensors.get(name) or next(iter(tied), None)
        if found is not None:
            return role, found
    raise MismatchError(
        f"tensor '{shown(name)}' has a row for each token, and {used[owner].label}, whose vocabulary the result is to"
        " have, lacks it; give --vocab the other model"
    )


def _all_embeddings_and_heads(used: Inputs) -> set[str]:
    return {name for each in used.values() for name in _embeddings_and_heads(each)}
