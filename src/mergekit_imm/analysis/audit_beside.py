"""What an audit looks at beside the weights: tokenizer, ties, rows of the vocabulary, notes."""

from __future__ import annotations

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.reader import same_bytes
from ..common.messages import shown
from ..errors import CheckpointError
from ..model.config import stated_tie
from ..model.tensor_names import is_input_embedding, is_output_head
from ..transforms.tokenizer_files import token_differences, token_table
from .audit_inputs import Audited
from .audit_verdict import Beside


def beside_of(found: Audited) -> Beside:
    """Return what is wrong beside the weights."""
    lost = next((each for each in found.claimed if each.rows is not None and each.rows[0] < each.rows[1]), None)
    rows = (
        "" if lost is None or lost.rows is None else f"'{shown(lost.name)}' has {lost.rows[0]} of {lost.rows[1]} rows"
    )
    return Beside(found.factors, _tokenizer(found), _tied_away(found), rows)


def _tokenizer(found: Audited) -> str:
    base, sft, merged = (found.models[role] for role in ("base", "sft", "merged"))
    trained = sft if _tokens(sft) else base
    wanted, there = _tokens(trained), _tokens(merged)
    if not wanted:
        return ""
    if not there:
        return f"MERGED has none, {trained.role.upper()} has one of {len(wanted)} tokens"
    if wanted != there:
        return f"it is not that of {trained.role.upper()}: {token_differences(trained, merged)}"
    return ""


def _tokens(model: Checkpoint) -> dict[int, str]:
    try:
        return token_table(model)
    except CheckpointError:
        return {}


def _tied_away(found: Audited) -> str:
    """Say if a stored head differs from the embedding to which the config ties it."""
    merged = found.models["merged"]
    heads = [name for name in merged.tensors if is_output_head(name) and name in found.models["base"].tensors]
    embeddings = [name for name in merged.tensors if is_input_embedding(name)]
    if stated_tie(merged.config) is not True or len(heads) != 1 or len(embeddings) != 1:
        return ""
    head, embedding = (merged.tensors[name] for name in (*heads, *embeddings))
    if head.shape != embedding.shape or same_bytes(found.models, ("merged", head), ("merged", embedding)):
        return ""
    return f"config.json of MERGED ties '{shown(heads[0])}' to the embedding, though they differ"


def notes_of(found: Audited) -> list[str]:
    """Return what is worth knowing, and no fault."""
    notes = [str(note) for note in found.notes if note.code not in ("vocabulary", "tie broken")]
    notes += [f"note: not compared: {problem}" for problem in found.problems]
    if found.surplus:
        first, count = f"'{shown(found.surplus[0])}'", len(found.surplus)
        notes.append(
            f"note: {first} is in MERGED only"
            if count == 1
            else f"note: {count} tensors are in MERGED only, {first} first"
        )
    merged = found.models["merged"]
    notes += [
        f"note: '{shown(each.name)}' has {each.rows[0]} rows, {each.rows[0] - each.rows[1]} more than claimed"
        for each in found.claimed
        if each.rows is not None and each.rows[0] > each.rows[1]
    ]
    if merged.adapters:
        notes.append(f"note: an adapter lies in {shown(merged.adapters[0])} of MERGED")
    return notes
