"""Load models and their tokenizers with transformers; every failure is one line that names the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..common.json_files import parse_json, read_small
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError, MergeError, MismatchError, extra_error
from .calibration import Tokens

if TYPE_CHECKING:
    from torch import nn

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for anything but the folder of a complete model."""
    if checkpoint.config is None or checkpoint.folder is None:
        raise CheckpointError(f"{checkpoint.label} has no config.json; give the folder of a complete model")


def check_device_exists(device: str) -> None:
    """Raise ArgumentError for a device that this machine does not have."""
    import torch

    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device is {shown(repr(device))}; it must be cpu or cuda") from error
    if asked.type != "cpu" and (asked.type != "cuda" or (asked.index or 0) >= torch.cuda.device_count()):
        available = "cpu or cuda" if torch.cuda.device_count() else "cpu, as torch finds no usable GPU"
        raise ArgumentError(f"device {shown(device)} does not exist; give {available}")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load a model's tokenizer. Raises CheckpointError, and ExtraError without transformers."""
    transformers = _transformers()
    with loading(f"the tokenizer of {checkpoint.label}"):
        return _tokenizer_class(checkpoint, transformers).from_pretrained(checkpoint.folder, local_files_only=True)


def load_model(checkpoint: Checkpoint, dtype: str) -> nn.Module:
    """Load a causal language model, on the CPU. Raises CheckpointError, also for missing weights."""
    transformers = _transformers()
    with loading(checkpoint.label):
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


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise extra_error("loading a model", "transformers") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


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
def loading(what: str) -> Iterator[None]:
    """Turn any exception of the block, which loads something, into a CheckpointError of one line."""
    try:
        yield
    except MergeError:
        raise
    except Exception as error:  # transformers and its dependencies raise all kinds
        raise CheckpointError(f"{what} cannot be loaded: {_text(error)}; check that transformers loads it") from error


@contextmanager
def running(checkpoint: Checkpoint, device: str) -> Iterator[None]:
    """Turn a RuntimeError of the block, which runs a model, into one line."""
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


def check_fit(network: Any, sequences: Sequence[Tokens], checkpoint: Checkpoint) -> None:
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
