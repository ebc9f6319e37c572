"""Measure KL(base || model) of checkpoints on a data file: the work of `imm-analyze kl`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open_checkpoint import open_checkpoint
from ..common.display import Displayed, Summary
from ..common.json_files import parse_json, read_small, without_duplicates
from ..common.messages import shown
from ..common.progress import Watched, watched
from ..errors import ExtraError, MismatchError, OutputError
from ..evaluation.bootstrap import text_of
from ..options.recipe import to_json
from ..output.direct_io import replace_file
from ..output.paths import expanded
from ..output.write_errors import output_errors
from ..plan.make_plan import recipe_entry
from ..transforms.tokenizer_files import check_tokens, token_table
from .calibration import batches, read_lines, tokenised
from .loading import check_complete, check_device_exists, check_fit, load_model, load_tokenizer, loading, running

if TYPE_CHECKING:
    from torch import nn

    from .divergence import Divergence

FORMAT = "mergekit_imm kl 1"


@dataclass(frozen=True, repr=False)
class MeasuredKL(Displayed):
    """Models as typed, each with its divergence from the base; the content of the JSON; notes."""

    models: dict[str, Divergence]
    content: dict[str, Any]
    notes: tuple[str, ...]

    def _summary(self) -> Summary:
        rows = [[shown(name, 40), text_of(each.kl, "")] for name, each in self.models.items()]
        line = "; ".join(f"{shown(name, 40)} {each.kl.value:.3g}" for name, each in self.models.items())
        return Summary(f"nats per token from the base: {line}", self.notes, ("model", "KL(base || model)"), rows)


def measure_kl(
    base: str,
    models: Sequence[str],
    data: str,
    *,
    samples: int | None = None,
    max_length: int = 1024,
    batch_size: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Watched = None,
) -> MeasuredKL:
    """Load a base and models with transformers, and measure KL(base || model) of each on a data file.

    Texts are tokenised by base's tokenizer, and models must have the same tokens. At most two models are in memory. An
    adapter is added to the model that its config names, if that is a folder, else to base. Raises the errors of
    `mean_kl`, `read_lines` and `open_checkpoint`.
    """
    lines = read_lines(data, samples)
    origin = open_checkpoint(base, "base")
    check_complete(origin)
    ids = 1 + max(token_table(origin), default=0)
    notes = []
    opened = {}
    for ref in dict.fromkeys(models):
        checkpoint = open_checkpoint(ref, "model")
        start = _start_of(checkpoint, origin)
        check_complete(start)
        opened[ref] = (checkpoint, start)
        if checkpoint.adapter is not None:
            notes.append(f"note: {checkpoint.label} is an adapter, and is added to {start.label}")
        cure = "the KL of different tokens has no meaning; give models with the same tokenizer"
        if checkpoint.adapter is None and (found := check_tokens(origin, checkpoint, ids, cure)):
            notes.append(str(found))
    check_device_exists(device)
    tokenizer = load_tokenizer(origin)
    with loading(f"{lines.name} by the tokenizer of {origin.label}"):
        sequences = tokenised(lines, tokenizer, max_length)
    with running(origin, device):
        reference = load_model(origin, dtype).to(device)
    check_fit(reference, sequences, origin)

    from .divergence import mean_kl

    measured = {}
    with watched(progress, "measuring", rate=lambda x: f"{x:.2f} sequences/s") as update:
        for number, (ref, (checkpoint, start)) in enumerate(opened.items()):
            done = number * len(sequences)

            def report(count: int, done: int = done) -> None:
                if update is not None:
                    update(done + count, len(opened) * len(sequences))

            report(0)
            with running(checkpoint, device):
                network = _load(checkpoint, start, dtype).to(device)
                rows = _rows(network)
                if left_out := max(0, _rows(reference) - rows):
                    _check_padding(tokenizer, rows, checkpoint)
                    notes.append(
                        f"note: {checkpoint.label} has {rows} rows for tokens, base {left_out} more, which are padding:"
                        " they are left out"
                    )
                check_fit(network, sequences, checkpoint)
                vocabulary = rows if left_out else None
                measured[ref] = mean_kl(
                    reference, network, batches(sequences, batch_size), vocabulary=vocabulary, progress=report
                )
                del network
    cut = [each.cut for each in sequences if each.cut]
    if cut:
        notes.append(
            f"note: {len(cut)} of {len(sequences)} texts were longer than {max_length} tokens; {sum(cut)} tokens were"
            " cut off at the end"
        )
    if samples is not None and lines.available < samples:
        notes.append(f"note: {shown(lines.name)} holds {lines.available} examples, fewer than the {samples} asked for")
    content = {
        "format": FORMAT,
        "base": recipe_entry(origin),
        "data": {"file": lines.name, "blake2b": lines.blake2b, "examples": lines.available},
        "max_length": max_length,
        "cut_texts": len(cut),
        "cut_tokens": sum(cut),
        "dtype": str(next(reference.parameters()).dtype).removeprefix("torch."),
        "models": [{"model": recipe_entry(opened[ref][0]), **each.to_dict()} for ref, each in measured.items()],
    }
    return MeasuredKL(measured, content, tuple(notes))


def numbers_to_extend(typed: str) -> dict[str, Any]:
    """Return the JSON object in a file to which `kl` can be added, {} if there is no file. Raises OutputError."""
    path = expanded(typed)
    with output_errors(path):
        if not path.parent.is_dir():
            raise OutputError(f"{shown(typed)}: its folder {shown(path.parent)} does not exist; create it")
        if not path.exists():
            return {}
        content = read_small(path)
    try:
        found = parse_json(content, without_duplicates)
    except ValueError as error:
        raise OutputError(f"{shown(typed)} is not JSON: {shown(error, 200)}; give another file") from error
    if not isinstance(found, dict):
        raise OutputError(f"{shown(typed)} is not a JSON object; give another file")
    if "kl" in found:
        raise OutputError(f"{shown(typed)} already holds 'kl'; remove it, or give another file")
    return found


def add_kl(typed: str, numbers: Mapping[str, Any], kl: float) -> None:
    """Write the object back with `kl`, whole or not at all."""
    path = expanded(typed)
    with output_errors(path):
        replace_file(path, to_json({**numbers, "kl": kl}))


def _start_of(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Return the model that a checkpoint is loaded from: itself, or what an adapter was trained on."""
    if checkpoint.adapter is None:
        return checkpoint
    named = checkpoint.trained_on
    assert base.folder is not None
    if not isinstance(named, str) or not Path(named).is_dir() or Path(named).samefile(base.folder):
        return base
    return open_checkpoint(named, "start")


def _load(checkpoint: Checkpoint, start: Checkpoint, dtype: str) -> nn.Module:
    network = load_model(start, dtype)
    if checkpoint.adapter is None:
        return network
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ExtraError(f"{checkpoint.label} is an adapter; adding it needs peft: pip install peft") from error
    with loading(checkpoint.label), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what peft calls in transformers
        whole: nn.Module = PeftModel.from_pretrained(network, checkpoint.folder).merge_and_unload()
    return whole


def _rows(network: Any) -> int:
    rows: int = network.get_input_embeddings().num_embeddings
    return rows


def _check_padding(tokenizer: Any, rows: int, checkpoint: Checkpoint) -> None:
    """Raise MismatchError if base's tokenizer has tokens beyond a model's rows."""
    more = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if more:
        number, token = more[0]
        raise MismatchError(
            f"{checkpoint.label} has {rows} rows for tokens, and lacks {len(more)} tokens of base, first"
            f" '{shown(token)}' ({number}); KL(base || model) would be infinite"
        )
