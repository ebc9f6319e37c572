"""Resize vocabularies: merge the rows that all inputs have, take the others from one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Extended, Piece, Tensor, sliced
from ..common.messages import shown
from ..common.notes import Note, note
from ..errors import CheckpointError, MismatchError
from ..model.config import says_tied
from ..model.tensor_names import is_embedding_or_head, is_input_embedding, layer_key, ready_option
from ..numerics.dtypes import MERGED
from ..options.options import MergeOptions
from .lora_config import MERGE_FIRST
from .tokenizer_files import check_tokens

Inputs = Mapping[str, Checkpoint]


def resized(inputs: Inputs, options: MergeOptions) -> dict[str, Checkpoint]:
    """Return the inputs with one vocabulary: base's or sft's as `vocab` says.

    Tensors with a row for each token get the owner's number of rows: extra rows are cut off; missing ones are appended
    from the owner, as an `Extended`. With the base's vocabulary the sft's side files are left out. Raises MismatchError
    if an id means different tokens or tensors disagree on the number of rows, CheckpointError if tokens cannot be
    compared.
    """
    used = {role: each for role, each in inputs.items() if role != "start" or options.reference == "start"}
    base, sft = used["base"], used["sft"]
    rows = _row_counts(used)
    ends = _embeddings_and_heads(base)
    notes: list[Note | None] = []
    if ends:
        whole = ready_option("--take", *ends)
        cure = f"rows of different tokens are not merged: omit --vocab and take the tensors from the sft: {whole}"
        most = max(tensor.shape[0] for tensor in ends.values())
        for each in (used[role] for role in ("sft", "start") if role in used):
            common = min(rows[each.role], rows["base"]) if rows else most
            notes.append(check_tokens(base, each, common, cure))
    else:
        text = "{label} has no embedding under a known name; --vocab only chooses the other files"
        notes.append(note("vocabulary", text, label=base.label))
    found = dict(inputs)
    if rows:
        found |= _with_rows(used, rows, options.vocab)
        notes += _notes(used, rows, options.vocab)
    found["base"] = replace(found["base"], notes=tuple(each for each in notes if each is not None))
    if options.vocab == "base":
        left_out = tuple(sorted({*sft.left_out, *sft.side}))
        found["sft"] = replace(found["sft"], side={}, left_out=left_out)
    return found


def _notes(used: Inputs, rows: Mapping[str, int], owner: str) -> list[Note]:
    size, common = rows[owner], min(rows.values())
    notes = []
    if size > common:
        lacking = next(used[role].label for role in rows if rows[role] == common)
        notes.append(
            note(
                "vocabulary",
                "the vocabulary is that of {owner}, {size} rows; {common} are merged, and the {rest} that {lacking}"
                " lacks are copied",
                owner=used[owner].label,
                size=size,
                common=common,
                rest=size - common,
                lacking=lacking,
            )
        )
    notes += [
        note(
            "vocabulary",
            "{rows} rows of {label} beyond the {size} of {whose} are left out (--vocab {owner})",
            rows=rows[role] - size,
            label=used[role].label,
            size=size,
            whose=used[owner].label,
            owner=owner,
        )
        for role in ("base", "sft")
        if rows[role] > size
    ]
    return notes


def _embeddings_and_heads(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the embeddings and heads of a model, which have a row for each token."""
    return {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if is_embedding_or_head(name)
        and layer_key(name) is None
        and tensor.dtype in MERGED
        and len(tensor.shape) == 2
        and tensor.count
    }


def _row_counts(used: Inputs) -> dict[str, int]:
    """Return the number of rows of each model, by role; empty if all are equal."""
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
                f" {sorted(found)} rows; --vocab needs the same number in all tensors of a model: resize them alike"
            )
    rows = {role: found.pop() for role, found in counts.items() if found}
    # An adapter without them leaves those of the model it was trained on.
    return {role: rows.get(role, rows.get("start", rows["base"])) for role in used}


def _with_rows(used: Inputs, rows: Mapping[str, int], owner: str) -> dict[str, Checkpoint]:
    """Return the models with the owner's number of rows in every tensor that has a row for each token."""
    names = _vocabulary_tensors(used, rows)
    found = {}
    for role, each in used.items():
        tensors = dict(each.tensors)
        for name in names & set(tensors):
            tensors[name] = _with_rows_of(name, role, used, rows, owner)
        found[role] = replace(each, tensors=tensors, rows=(rows[role], rows[owner]))
    return found


def _vocabulary_tensors(used: Inputs, rows: Mapping[str, int]) -> set[str]:
    """Return the tensors with a row for each token: embeddings, heads, and those that differ in the same way."""
    base = used["base"]
    names = {name for name, tensor in _embeddings_and_heads(base).items() if tensor.shape[0] == rows["base"]}
    if used["sft"].adapter is not None and rows["sft"] != rows["base"]:
        # An adapter does not store the bias of logits that was resized with its model.
        names |= {name for name, tensor in base.tensors.items() if tensor.shape == (1, rows["base"])}
    for role, each in used.items():
        if says_tied(base.config):  # each model may store another of the tied names
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
    origin, whole = _owners_tensor(name, used, owner)
    size, common = rows[owner], min(rows.values())
    # A single row with a column for each token is a bias of logits, as in BART.
    axis = 1 if whole.shape == (1, size) and tensor.shape == (1, rows[role]) else 0

    def shaped(count: int) -> tuple[int, ...]:
        return (1, count) if axis else (count, *whole.shape[1:])

    for each, there in ((role, tensor), (owner, whole)):
        if there.shape != shaped(rows[each]) or there.dtype not in MERGED:
            raise MismatchError(
                f"tensor '{shown(name)}' is {there.dtype} {list(there.shape)} in {used[each].label}, but its vocabulary"
                f" has {rows[each]} rows; --vocab needs all of them resized: resize it too, or merge without --vocab"
            )
    if role == owner:
        return tensor
    columns = whole.count // size
    own = sliced(tensor, role, name, 0, shaped(common)) if rows[role] > common else tensor
    if size == common:
        return own
    if whole.is_delta:
        raise CheckpointError(
            f"{used[owner].label} has factors for tensor '{shown(name)}', which also change rows that"
            f" {used['base'].label} lacks; {MERGE_FIRST}"
        )
    rest = sliced(whole, origin, name, common * columns, shaped(size - common))
    corner = [0] * len(whole.shape)
    after = [*corner[:axis], common, *corner[axis + 1 :]]
    return Extended(name, whole.shape, (Piece(role, own, tuple(corner)), Piece(origin, rest, tuple(after))))


def _resized(shape: tuple[int, ...], before: int, after: int, axis: int) -> tuple[int, ...] | None:
    """A shape with `before` rows, or one row of `before` columns, resized to `after`; None for other shapes."""
    if axis:
        return (1, after) if shape == (1, before) else None
    return (after, *shape[1:]) if shape[:1] == (before,) else None


def _owners_tensor(name: str, used: Inputs, owner: str) -> tuple[str, Tensor]:
    """Return the owner's tensor and the role of the input it is in; a tied tensor matches by any of its names."""
    roles = [owner]
    if used[owner].adapter is not None:
        roles.append("start" if "start" in used else "base")
    for role in roles:
        each = used[role]
        tied = (
            _embeddings_and_heads(each).values()
            if says_tied(used["base"].config) and any(name in _embeddings_and_heads(one) for one in used.values())
            else ()
        )
        if each.adapter is not None and is_input_embedding(name):
            tied = ()  # a head that an adapter holds is a copy, trained apart from the embedding
        found = each.tensors.get(name) or next(iter(tied), None)
        if found is not None:
            return role, found
    raise MismatchError(
        f"tensor '{shown(name)}' has a row for each token, but {used[owner].label}, the owner of the vocabulary, lacks"
        " it; give --vocab the other model"
    )
