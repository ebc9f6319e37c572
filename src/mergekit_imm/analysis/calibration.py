"""Texts to measure importance on: from the lines of a JSONL file to batches of tokens."""

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

IGNORED = -100  # the label of a token that does not count in the loss
_KINDS = (("text",), ("prompt", "response"))


@dataclass(frozen=True)
class Lines:
    """The examples of a file: (number of the line, ("text",) or ("prompt", "response")), and what file it was."""

    name: str  # as typed
    kind: tuple[str, ...]
    examples: tuple[tuple[int, tuple[str, ...]], ...]
    there: int  # examples in the file, which may be more
    blake2b: str


@dataclass(frozen=True)
class Tokens:
    """One example as tokens: the first `prompt` of them do not count in the loss."""

    ids: tuple[int, ...]
    prompt: int
    cut: int  # tokens beyond the greatest length


def read_lines(path: str | Path, samples: int | None = None) -> Lines:
    """Read the first `samples` examples of a JSONL file, or all: {"text": ...} or {"prompt": ..., "response": ...}.

    Every line is checked, also those beyond; other keys are no matter, and lines of white space no examples. Raises
    ArgumentError that names file and line: for what is no JSON, of neither kind or of both, of another kind than the
    first, or empty where there must be text.
    """
    file = shown(path)
    kind: tuple[str, ...] = ()
    examples = []
    there, first = 0, 0
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
                there += 1
                if samples is None or there <= samples:
                    examples.append((number, values))
    except (OSError, RuntimeError) as error:  # the latter of a home that is not there
        raise ArgumentError(f"data file {file} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not examples:
        raise ArgumentError(f'data file {file} holds no examples; write a line {{"text": "..."}} for each')
    return Lines(str(path), kind, tuple(examples), there, digest.hexdigest())


def _example(line: bytes, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        content = parse_json(line, without_duplicates)
    except ValueError as error:
        raise ArgumentError(f"{where} is not JSON: {shown(error, 200)}") from error
    kinds = [kind for kind in _KINDS if isinstance(content, dict) and set(kind) <= set(content)]
    if len(kinds) != 1:
        keys = (
            f"has {', '.join(map(shown, list(content)[:6])) or 'no keys'}" if isinstance(content, dict) else "is none"
        )
        raise ArgumentError(f'{where} {keys}; it must be an object with either "text", or "prompt" and "response"')
    values = tuple(content[key] for key in kinds[0])
    for key, value in zip(kinds[0], values, strict=True):
        if not isinstance(value, str) or (not value and key != "prompt"):
            raise ArgumentError(f"{where}: {key} is {shown(repr(value), 60)}; it must be a string that is not empty")
    return kinds[0], values


def tokenised(lines: Lines, tokenizer: Any, max_length: int) -> list[Tokens]:
    """Return the examples as tokens of a model's own tokenizer, in their order, each at most `max_length` long.

    A text gets the special tokens that the tokenizer puts around one by itself, and counts as a whole. A prompt gets
    those that it puts before one; the response follows, then eos if the tokenizer has one, and only response and eos
    count. Where the tokens of a prompt are also the first ones of prompt and response written as one, the response's
    are the rest of these; else it is tokenised apart. No chat template is applied; a text or prompt that begins with
    bos gets no second one. What is beyond `max_length` is cut off at the end, and counted.

    Raises ArgumentError that names file and line if no token is left that counts.
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
                f"{shown(lines.name)}, line {number} has {len(ids)} tokens, {prompt} of them the prompt's, and none"
                f" among the first {max_length} that the loss counts; {cure}"
            )
        found.append(Tokens(kept, prompt, len(ids) - len(kept)))
    return found


def _with_specials(text: str, tokenizer: Any) -> list[int]:
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begins)["input_ids"])


def _without_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """Tokens without the eos that some tokenizers put behind a text."""
    is_added = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if is_added else ids


def batches(sequences: Sequence[Tokens], size: int, padding: int = 0) -> Iterator[Mapping[str, Tensor]]:
    """Yield batches of `size` sequences, in their order, padded on the right, with attention_mask and labels."""
    import torch

    for begin in range(0, len(sequences), size):
        group = sequences[begin : begin + size]
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
