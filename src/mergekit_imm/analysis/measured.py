"""Measure the importance of a checkpoint's layers on a data file: the work of `imm-analyze importance`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open_checkpoint import open_checkpoint
from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..common.progress import Watched, watched
from ..errors import ArgumentError, MismatchError, OutputError
from ..model.config import quantisation
from ..model.rename_rules import by_prefix
from ..model.tensor_names import layer_key, resolve_layers, unwrapped, weight_kind
from ..options.layer_factors import IMPORTANCE_FORMAT, Importance
from ..options.recipe import to_json
from ..output.direct_io import replace_file
from ..output.paths import expanded
from ..output.result_folder import is_result
from ..output.write_errors import output_errors
from ..plan.make_plan import recipe_entry
from .calibration import Lines, batches, read_lines, tokenised
from .loading import check_complete, check_device_exists, check_fit, load_model, load_tokenizer, loading, running


@dataclass(frozen=True, repr=False)
class Measured(Displayed):
    """A measured importance, the content of its file, and notes."""

    importance: Importance
    content: dict[str, Any]
    notes: tuple[str, ...]

    def _summary(self) -> Summary:
        found = self.importance._summary()
        return Summary(found.line, [*found.more, *self.notes], found.head, found.rows)

    def _picture(self) -> str:
        return self.importance._picture()


def measure_importance(
    model: str,
    data: str,
    out: str,
    *,
    order: str = "first",
    samples: int | None = None,
    max_length: int = 1024,
    batch_size: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    accumulate: str = "memory",
    progress: Watched = None,
) -> Measured:
    """Load a model with transformers, measure its layers on a data file, and write an importance file to `out`.

    Checks output, data and model files before loading the model. Layer keys are those of the model's files. Raises the
    errors of `layer_importance`, `read_lines` and `open_checkpoint`.
    """
    target = expanded(out)
    _check_output(target, out)
    lines = read_lines(data, samples)
    checkpoint = open_checkpoint(model, "model")
    check_complete(checkpoint)
    if quantisation(checkpoint.config) is not None:
        raise MismatchError(f"{checkpoint.label} is quantised and has no gradients; give the unquantised model")
    check_device_exists(device)
    tokenizer = load_tokenizer(checkpoint)
    with loading(f"{lines.name} by the tokenizer of {checkpoint.label}"):  # its own errors name no file
        sequences = tokenised(lines, tokenizer, max_length)
    with running(checkpoint, device):
        network = load_model(checkpoint, dtype).to(device)
    check_fit(network, sequences, checkpoint)
    keys = file_keys({name: tuple(w.shape) for name, w in network.named_parameters()}, checkpoint)

    from .gradients import layer_importance

    with watched(progress, "measuring", rate=lambda x: f"{x:.2f} sequences/s") as update, running(checkpoint, device):

        def report(done: int) -> None:
            if update is not None:
                update(done, len(sequences))

        report(0)
        found = layer_importance(
            network,
            batches(sequences, batch_size),
            order=order,
            accumulate="memory" if accumulate == "memory" else target.parent,
            progress=report,
        )
    found = _under(found, keys)
    own = str(next(network.parameters()).dtype).removeprefix("torch.")
    content = found.to_dict() | {
        "max_length": max_length,
        "cut_sequences": sum(each.cut > 0 for each in sequences),
        "cut_tokens": sum(each.cut for each in sequences),
        "dtype": own,
        "model": recipe_entry(checkpoint),
        "data": {"file": lines.name, "blake2b": lines.blake2b, "examples": lines.available},
    }
    with output_errors(target):
        replace_file(target, to_json(content))
    return Measured(found, content, _notes(content, lines, samples))


def file_keys(weights: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict[str, str]:
    """Return layer key in memory -> layer key in the model's files, which may differ in a prefix.

    Raises MismatchError if memory and files have different layers.
    """
    names = {unwrapped(name): shape for name, shape in weights.items()}
    lost = {name: shape for name, shape in names.items() if name not in checkpoint.tensors}
    free = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in names}
    called = by_prefix(lost, free)
    keys = {}
    for name, shape in names.items():
        key = layer_key(name)
        if key is None:
            continue
        if name in called or name in checkpoint.tensors:
            keys[key] = layer_key(called.get(name, name)) or key
        elif weight_kind(name, shape) == "linear":
            keys.setdefault(key, key)
    linear = {layer_key(name) for name, shape in names.items() if weight_kind(name, shape) == "linear"}
    keys = {key: stored for key, stored in keys.items() if key in linear}
    try:
        resolve_layers(dict.fromkeys(keys.values(), 1.0), checkpoint.tensors)
    except ArgumentError as error:
        raise MismatchError(
            f"{checkpoint.label}: the layers that transformers loads differ from those of the files: {error}"
        ) from error
    return keys


def _under(found: Importance, keys: Mapping[str, str]) -> Importance:
    return replace(
        found,
        layers={keys[key]: value for key, value in found.layers.items()},
        modules={kind: {keys[k]: value for k, value in each.items()} for kind, each in found.modules.items()},
    )


def _notes(content: Mapping[str, Any], lines: Lines, samples: int | None) -> tuple[str, ...]:
    notes = []
    if content["cut_tokens"]:
        notes.append(
            f"note: {content['cut_sequences']} of {content['sequences']} sequences were longer than"
            f" {content['max_length']} tokens; {content['cut_tokens']} tokens were cut off at the end"
        )
    if samples is not None and lines.available < samples:
        notes.append(f"note: {shown(lines.name)} holds {lines.available} examples, fewer than the {samples} asked for")
    if content["dtype"] == "float16":
        notes.append("note: gradients of a float16 model underflow; --dtype float32 is safe")
    if content["unused"]:
        stacks = ", ".join(f"{shown(stack)}.*" for stack in content["unused"])
        notes.append(f"note: {stacks} took no part in the loss and are left out")
    return tuple(notes)


def _check_output(target: Path, typed: str) -> None:
    """Raise OutputError if the file cannot be written there, or would replace something else."""
    with output_errors(target):
        if target.is_dir() or target.name in ("", ".", ".."):
            raise OutputError(f"output {shown(typed)} is a folder; give a file name")
        if not target.parent.is_dir():
            raise OutputError(f"output {shown(typed)}: its folder {shown(target.parent)} does not exist; create it")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if target.exists() and not is_result(target, IMPORTANCE_FORMAT):
            raise OutputError(f"output {shown(typed)} exists and is not an importance file; choose another name")
