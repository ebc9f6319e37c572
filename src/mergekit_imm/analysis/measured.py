"""Measure the importance of a checkpoint's layers on a data file: the work of `imm-analyze importance`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open_checkpoint import open_checkpoint
from ..common.json_files import parse_json, read_small
from ..common.messages import shown
from ..errors import (
    ArgumentError,
    CheckpointError,
    MergeError,
    MismatchError,
    OutputError,
    extra_error,
)
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
from .calibration import Lines, Tokens, batches, read_lines, tokenised

if TYPE_CHECKING:
    from torch import nn

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class Measured:
    """A measured importance, the content of its file, and notes."""

    importance: Importance
    content: dict[str, Any]
    notes: tuple[str, ...]


def measure_importance(
    model: str,
    data: str,
    out: str,
    *,
    order: str = "first",
    samples: int | None = None,
    max_length: int = 1024,
    batch_size: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    accumulate: str = "memory",
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Load a model with transformers, measure its layers on a data file, and write an importance file to `out`.

    Checks output, data and model files before loading the model. Layer keys are those of the model's files. Raises the
    errors of `layer_importance`, `read_lines` and `open_checkpoint`.
    """
    target = expanded(out)
    _check_output(target, out)
    lines = read_lines(data, samples)
    checkpoint = open_checkpoint(model, "model")
    if checkpoint.config is None or checkpoint.folder is None:
        raise CheckpointError(f"{checkpoint.label} has no config.json; give the folder of a complete model")
    if quantisation(checkpoint.config) is not None:
        raise MismatchError(f"{checkpoint.label} is quantised and has no gradients; give the unquantised model")
    _check_device(device)
    tokenizer, loaded = _transformers(checkpoint, dtype)
    with _loading(f"{lines.name} by the tokenizer of {checkpoint.label}"):  # its own errors name no file
        sequences = tokenised(lines, tokenizer, max_length)
    with _running(checkpoint, device):
        network = loaded().to(device)
    _check_fit(network, sequences, checkpoint)
    keys = file_keys({name: tuple(w.shape) for name, w in network.named_parameters()}, checkpoint)

    from .gradients import layer_importance

    def report(done: int) -> None:
        if progress is not None:
            progress(done, len(sequences))

    report(0)
    with _running(checkpoint, device):
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


def _check_device(device: str) -> None:
    import torch

    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device is {shown(repr(device))}; it must be cpu or cuda") from error
    if asked.type != "cpu" and (asked.type != "cuda" or (asked.index or 0) >= torch.cuda.device_count()):
        available = "cpu or cuda" if torch.cuda.device_count() else "cpu, as torch finds no usable GPU"
        raise ArgumentError(f"device {shown(device)} does not exist; give {available}")


def _transformers(checkpoint: Checkpoint, dtype: str) -> tuple[Any, Callable[[], nn.Module]]:
    """The tokenizer, and a function that loads the model. Any failure is a CheckpointError of one line."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise extra_error("loading a model", "transformers", "analyze") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def load() -> nn.Module:
        with _loading(checkpoint.label):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{checkpoint.label} lacks {len(missing)} of the weights that its config requires, first"
                f" '{shown(missing[0])}'; is it the complete model?"
            )
        network: nn.Module = model
        return network

    with _loading(f"the tokenizer of {checkpoint.label}"):
        tokenizer = _tokenizer_class(checkpoint, transformers).from_pretrained(checkpoint.folder, local_files_only=True)
    return tokenizer, load


def _tokenizer_class(checkpoint: Checkpoint, transformers: Any) -> Any:
    """The class that loads the tokenizer exactly as stored.

    Even if the files name a generic class, so that tokenizer.json is complete, AutoTokenizer may silently build the
    architecture's own tokenizer, as transformers 5 does for Qwen2, with other tokens.
    """
    assert checkpoint.folder is not None
    about = checkpoint.folder / "tokenizer_config.json"
    if about.exists() and (checkpoint.folder / "tokenizer.json").exists():
        content = parse_json(read_small(about))
        if isinstance(content, dict) and content.get("tokenizer_class") in _GENERIC:
            return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


@contextmanager
def _loading(what: str) -> Any:
    try:
        yield
    except MergeError:
        raise
    except Exception as error:  # transformers and its dependencies raise all kinds
        raise CheckpointError(f"{what} cannot be loaded: {_text(error)}; check that transformers loads it") from error


@contextmanager
def _running(checkpoint: Checkpoint, device: str) -> Any:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ArgumentError(
            f"{shown(device)} does not have enough memory; use a smaller --batch-size or --max-length, or"
            " --dtype bfloat16"
        ) from error
    except RuntimeError as error:  # from the model's code, or out of CPU memory
        raise CheckpointError(
            f"{checkpoint.label} fails to run: {_text(error)}; check that transformers runs it"
        ) from error


def _text(error: Exception) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__, 300)


def _check_fit(network: Any, sequences: list[Tokens], checkpoint: Checkpoint) -> None:
    """Raise MismatchError for tokens or positions that the model lacks."""
    rows = network.get_input_embeddings().num_embeddings
    largest = max(max(each.ids) for each in sequences)
    if largest >= rows:
        raise MismatchError(
            f"{checkpoint.label}: its tokenizer produces token {largest}, but its embedding has {rows} rows; restore"
            " the model's own tokenizer"
        )
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(each.ids) for each in sequences)
    if positions and longest > positions:
        raise MismatchError(
            f"{checkpoint.label} has {positions} positions, but the longest sequence has {longest} tokens; give"
            f" --max-length {positions}"
        )
