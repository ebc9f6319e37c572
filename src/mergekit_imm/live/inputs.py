"""What merges of weights in memory share: base and start opened, and the names of modules that are numbered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open_checkpoint import open_checkpoint
from ..common.json_files import parse_json, read_small
from ..common.messages import shown
from ..errors import CheckpointError, MismatchError
from ..model.tensor_names import is_embedding_or_head, unwrapped
from ..options.options import MergeOptions
from ..plan.open_inputs import check_left_out


def opened(refs: Mapping[str, str | Path], options: MergeOptions, *, dry_run: bool = False) -> dict[str, Checkpoint]:
    """Open base and start. Raises CheckpointError, ArgumentError."""
    found = {
        role: open_checkpoint(ref, role, dry_run=dry_run, leave_out=options.leave_out) for role, ref in refs.items()
    }
    check_left_out(found, options.leave_out)
    return found


def placer(base: Checkpoint) -> Callable[[str], str]:
    """Return a function that maps names of numbered modules (sentence-transformers) to paths in the base.

    The base's modules.json maps numbers to folders. The attribute that holds the inner model is dropped from names.
    Names of other models stay.
    """
    file = base.side.get("modules.json")
    if file is None:
        return lambda name: name
    try:
        modules = parse_json(read_small(file))
        folders = {str(each["idx"]): f"{each['path']}/" if each["path"] else "" for each in modules}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{shown(file)} is not a list of modules: {shown(error, 200)}; download it again"
        ) from error

    def placed(name: str) -> str:
        number, _, rest = unwrapped(name).partition(".")
        paths = [folders.get(number, "") + each for each in (rest, rest.partition(".")[2]) if number in folders]
        return next((path for path in paths if path in base.tensors), name)

    return placed


def check_vocabularies(base: Checkpoint, sft: Checkpoint, cure: str) -> None:
    """Raise MismatchError for an embedding or head of another number of tokens than the base's."""
    for name, tensor in sft.tensors.items():
        there = base.tensors.get(name)
        if there is not None and is_embedding_or_head(name) and there.shape != tensor.shape:
            raise MismatchError(
                f"tensor '{shown(name)}' is {list(there.shape)} in {base.label} and {list(tensor.shape)} in"
                f" {sft.label}; a model in memory needs a base of the same vocabulary: {cure}"
            )
