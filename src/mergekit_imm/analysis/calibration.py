"""Calibration data for importance: from the lines of a JSONL file to batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.json_files import parse_json, plain_size, without_duplicates
from ..common.messages import shown
from ..errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # label of tokens that do not count in the loss
TOGETHER = 1024  # tokens of short texts in one batch
_KINDS = (("text",), ("prompt", "response"), ("prompt", "completion"))


@dataclass(frozen=True)
class Lines:
    """The examples of a file, and the file's name and digest."""

    name: str  # as typed
    kind: tuple[str, ...]  # ("text",), ("prompt", "response") or ("prompt", "completion")
    examples: tuple[tuple[int, tuple[str, ...]], ...]  # (line number, values of the keys in `kind`)
    available: int  # number of examples in the whole file
    blake2b: str


@dataclass(frozen=True)
class Tokens:
    """One example as tokens."""

    ids: tuple[int, ...]
    prompt: int  # number of tokens at the beginning that do not count in the loss
    cut: int  # number of tokens cut off at the end


def read_lines(path: str | Path, samples: int | None = None) -> Lines:
    """Read the first `samples` examples of a JSONL file, or all: {"text": ...} or {"prompt": ..., "response": ...}.

    "completion" means the same as "response". All lines of the file are checked; other keys are ignored, and blank
    lines skipped. Raises ArgumentError, with file and line, for invalid JSON, for an object of no kind or several or of
    another kind than the first, and for empty text.
    """
    file = shown(path)
    kind: tuple[str, ...] = ()
    examples = []
    available, first = 0, 0
    digest = blake2b(digest_size=16)
    try:
        plain_size(Path(path).expanduser())
        with Path(path).expanduser().open("rb") as lines:
            for number, line in enumerate(lines, 1):
                digest.update(line)
                if not line.strip():
                    continue
                found, values = _example(line, f"{file}, line {number}")
                if kind and found != kind:
                    raise ArgumentError(
                        f"{file}, line {number} has {' and '.join(found)}, but line {first} has {' and '.join(kind)};"
                        " one file holds examples of one kind"
                    )
                kind, first = found, first or number
                available += 1
                if samples is None or available <= samples:
                    examples.append((number, values))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise ArgumentError(f"data file {file} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not examples:
        raise ArgumentError(f'data file {file} holds no examples; write one line {{"text": "..."}} per example')
    return Lines(str(path), kind, tuple(examples), available, digest.hexdigest())


def _example(line: bytes, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        content = parse_json(line, without_duplicates)
    except ValueError as error:
        raise ArgumentError(f"{where} is not JSON: {shown(error, 200)}") from error
    kinds = [kind for kind in _KINDS if isinstance(content, dict) and set(kind) <= set(content)]
    if len(kinds) != 1:
        keys = (
            f"has {', '.join(map(shown, list(content)[:6])) or 'no keys'}"
            if isinstance(content, dict)
            else "is not an object"
        )
        raise ArgumentError(f'{where} {keys}; write an object with "text", or "prompt" and "response" or "completion"')
    values = tuple(content[key] for key in kinds[0])
    for key, value in zip(kinds[0], values, strict=True):
        if not isinstance(value, str) or (not value and key != "prompt"):
            raise ArgumentError(f"{where}: {key} is {shown(repr(value), 60)}; it must be a non-empty string")
    return kinds[0], values


def tokenised(lines: Lines, tokenizer: Any, max_length: int) -> list[Tokens]:
    """Tokenise examples with a model's own tokenizer, in order, each to at most `max_length` tokens.

    A text gets the tokenizer's own special tokens, and all of it counts. A prompt gets only those at the beginning,
    followed by the response and eos, if the tokenizer has one; response and eos count. Prompt and response are
    tokenised together if the prompt's tokens are a prefix of the result, and separately otherwise. No chat template is
    applied, and a text or prompt that begins with bos gets no second one. Tokens beyond `max_length` are cut off.

    Raises ArgumentError, with file and line, if no token that counts is left.
    """
    found = []
    for number, values in lines.examples:
        if len(values) == 1:
            prompt, ids = 0, _with_specials(values[0], tokenizer)
        else:
            before = _without_end(_with_specials(values[0], tokenizer), values[0], tokenizer)
            whole = _without_end(_with_specials("".join(values), tokenizer), values[1], tokenizer)
            if whole[: len(before)] != before:
                whole = before + list(tokenizer(values[1], add_special_tokens=False)["input_ids"])
            end = tokenizer.eos_token_id
            prompt = len(before)
            ids = whole if end is None or whole[-1:] == [end] else [*whole, end]
        kept = tuple(ids[:max_length])
        if len(kept) <= max(prompt, 1):
            cure = "shorten it, leave it out, or raise --max-length" if len(ids) > len(kept) else "leave it out"
            raise ArgumentError(
                f"{shown(lines.name)}, line {number} has {len(ids)} tokens, {prompt} of them in the prompt, and none"
                f" of the first {max_length} counts in the loss; {cure}"
            )
        found.append(Tokens(kept, prompt, len(ids) - len(kept)))
    return found


def _with_specials(text: str, tokenizer: Any) -> list[int]:
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begins)["input_ids"])


def _without_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """Drop the eos that some tokenizers append to a text."""
    is_added = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if is_added else ids


def batches(sequences: Sequence[Tokens], size: int | None, padding: int = 0) -> Iterator[Mapping[str, Tensor]]:
    """Yield batches of `size` sequences, in order: input_ids padded on the right, attention_mask, labels (int64).

    None: as many as fit into TOGETHER tokens, padding included, so that short texts do not each cost a pass over all
    weights.
    """
    import torch

    for group in _groups(sequences, size):
        shape = (len(group), max(len(each.ids) for each in group))
        ids = torch.full(shape, padding)
        mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for row, each in enumerate(group):
            count = len(each.ids)
            ids[row, :count] = torch.tensor(each.ids)
            mask[row, :count] = 1
            labels[row, each.prompt : count] = ids[row, each.prompt : count]
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _groups(sequences: Sequence[Tokens], size: int | None) -> Iterator[list[Tokens]]:
    group: list[Tokens] = []
    longest = 0
    for each in sequences:
        width = max(longest, len(each.ids))
        if group and (len(group) == size if size else width * (len(group) + 1) > TOGETHER):
            yield group
            group, width = [], len(each.ids)
        group.append(each)
        longest = width
    if group:
        yield group
