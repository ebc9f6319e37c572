"""Read a model's tokens from its tokenizer files, and compare those of two models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..common.json_files import parse_json, read_small
from ..common.messages import shown
from ..common.notes import Note, note
from ..errors import CheckpointError, MismatchError

_FAST, _VOCAB, _LINES = "tokenizer.json", "vocab.json", "vocab.txt"
_ADDED, _CONFIG = "added_tokens.json", "tokenizer_config.json"
_OPAQUE = re.compile(r"[^/]+\.(model|tiktoken|spm)|tekken\.json")  # sentencepiece and other formats that are not parsed
_SHOWN = 3

Table = dict[int, str]


def check_tokens(one: Checkpoint, other: Checkpoint, rows: int, cure: str) -> Note | None:
    """Check that ids below `rows` are the same tokens in two models, where both define them.

    Returns a note if a model has no tokenizer, so that nothing was compared, else None. Raises MismatchError that lists
    the differences and ends in `cure`, CheckpointError for a tokenizer that cannot be compared.
    """
    lacking = next((each for each in (one, other) if not _names(each)), None)
    if lacking is not None:
        text = "{label} has no tokenizer, so the models' tokens were not compared"
        return note("no tokenizer", text, label=lacking.label)
    if any(each.side[name] is None for each in (one, other) for name in _names(each)):
        return None  # a dry run on a hub id; the merge compares them
    if _same_files(one, other, _names(one) | _names(other)):
        return None
    tables = [token_table(each) for each in (one, other)]
    opaque = {name for each in (one, other) if not _has_table(each) for name in _names(each) if _OPAQUE.fullmatch(name)}
    if opaque and not _same_files(one, other, opaque):
        whose = next(each for each in (one, other) if not _has_table(each))
        raise CheckpointError(
            f"the tokens of {one.label} and {other.label} cannot be compared: {whose.label} has only"
            f" {shown(min(opaque))}, which is not supported; save both tokenizers with transformers, as {_FAST}"
        )
    differing = [
        (number, token, tables[1][number])
        for number, token in sorted(tables[0].items())
        if number < rows and tables[1].get(number, token) != token
    ]
    if not differing:
        return None
    listed = ", ".join(f"{n} ('{shown(a)}' and '{shown(b)}')" for n, a, b in differing[:_SHOWN])
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    raise MismatchError(
        f"{len(differing)} of the first {rows} ids are different tokens in {one.label} and {other.label}:"
        f" {listed}{more}; {cure}"
    )


def token_differences(one: Checkpoint, other: Checkpoint) -> str:
    """Describe which tokens only one of two models has; "" if their tokenizers cannot be read."""
    try:
        tables = [token_table(each) for each in (one, other)]
    except CheckpointError:
        return ""
    if not all(tables):
        return ""
    differences = []
    for each, mine, others in ((one, tables[0], tables[1]), (other, tables[1], tables[0])):
        more = sorted(set(mine) - set(others))
        if more:
            listed = ", ".join(f"'{shown(mine[number])}' ({number})" for number in more[:_SHOWN])
            rest = f" and {len(more) - _SHOWN} others" if len(more) > _SHOWN else ""
            differences.append(f"{each.role}'s tokenizer has {len(more)} more: {listed}{rest}")
    changed = sum(token != tables[1].get(number, token) for number, token in tables[0].items())
    if changed:
        differences.append(f"{changed} ids are different tokens")
    return ", and ".join(differences) or "their tokenizers have the same tokens"


def token_table(checkpoint: Checkpoint) -> Table:
    """Return the tokens of a model by id, empty if it has no file that can be parsed.

    Raises CheckpointError for a file that is damaged or has an unknown form.
    """
    if _FAST in checkpoint.side:
        content = _content(checkpoint, _FAST)
        vocab = content["model"].get("vocab") if isinstance(content.get("model"), dict) else None
        if isinstance(vocab, list):  # Unigram: pairs of token and score, in the order of the ids
            pairs = [(entry[0] if isinstance(entry, list) and entry else None, i) for i, entry in enumerate(vocab)]
        elif isinstance(vocab, dict):
            pairs = [*vocab.items()]
        else:
            raise _not_understood(checkpoint, _FAST)
        added = content.get("added_tokens") or []
        if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
            raise _not_understood(checkpoint, _FAST)
        return _table([*pairs, *((entry.get("content"), entry.get("id")) for entry in added)], checkpoint, _FAST)
    table: Table = {}
    if _VOCAB in checkpoint.side:
        table |= _table(_content(checkpoint, _VOCAB).items(), checkpoint, _VOCAB)
    elif _LINES in checkpoint.side:
        try:
            lines = _bytes(checkpoint, _LINES).decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise _not_understood(checkpoint, _LINES) from error
        table |= dict(enumerate(lines))
    if _ADDED in checkpoint.side:
        table |= _table(_content(checkpoint, _ADDED).items(), checkpoint, _ADDED)
    if _CONFIG in checkpoint.side:
        decoder = _content(checkpoint, _CONFIG).get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict) or not all(isinstance(entry, dict) for entry in decoder.values()):
            raise _not_understood(checkpoint, _CONFIG)
        numbers = (int(key) if re.fullmatch("[0-9]{1,9}", key) else None for key in decoder)
        table |= _table(
            zip((entry.get("content") for entry in decoder.values()), numbers, strict=True), checkpoint, _CONFIG
        )
    return table


def _table(pairs: Iterable[tuple[Any, Any]], checkpoint: Checkpoint, name: str) -> Table:
    table: Table = {}
    for token, number in pairs:
        if not isinstance(token, str) or type(number) is not int or number < 0:
            raise _not_understood(checkpoint, name)
        table[number] = token
    return table


def _not_understood(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.label}: {name} is not understood as a table of tokens and their ids; save the tokenizer again"
        " with transformers"
    )


def _names(checkpoint: Checkpoint) -> set[str]:
    """The files that define a model's tokens: one that has them all, or several."""
    if _FAST in checkpoint.side:
        return {_FAST}
    found = {name for name in checkpoint.side if name in (_VOCAB, _LINES) or _OPAQUE.fullmatch(name)}
    return found | ({_ADDED, _CONFIG} & set(checkpoint.side)) if found else found


def _has_table(checkpoint: Checkpoint) -> bool:
    return any(name in checkpoint.side for name in (_FAST, _VOCAB, _LINES))


def _same_files(one: Checkpoint, other: Checkpoint, names: set[str]) -> bool:
    return all(
        name in one.side and name in other.side and _bytes(one, name) == _bytes(other, name) for name in sorted(names)
    )


def _content(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    try:
        content = parse_json(_bytes(checkpoint, name))
    except ValueError as error:
        why = shown(error, 200)
        raise CheckpointError(f"{checkpoint.label}: {name} is not JSON: {why}; copy or download it again") from error
    if not isinstance(content, dict):
        raise _not_understood(checkpoint, name)
    return content


def _bytes(checkpoint: Checkpoint, name: str) -> bytes:
    path = checkpoint.side[name]
    if path is None:
        raise CheckpointError(f"{checkpoint.label}: {name} is not downloaded; merge, or download it first")
    try:
        return read_small(path)
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint.label}: {name} cannot be read: {error.strerror}; copy or download it again"
        ) from error
