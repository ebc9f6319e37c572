"""Save a model in memory to a folder, atomically, with every check made beforehand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.open_checkpoint import open_checkpoint
from ..checkpoint.safetensors_file import MODEL
from ..common.messages import shown
from ..errors import OutputError
from ..model.tensor_names import tied_key, unwrapped
from ..output import direct_io

if TYPE_CHECKING:
    import torch

_MARK = ".imm_saving"  # marks an OUT.partial of a save: its leftovers may be removed
_BUSY = "is being written by another process; give another output, or a `save` where several ranks hold the model"


@contextmanager
def saving(
    sft: Any, out: Path, base: str | Path, save: Callable[[Any, Path], object] | None
) -> Iterator[Callable[[], object]]:
    """Prepare `out` for a model, or a mapping of tensors, and yield a function that saves it there.

    It calls `save` if given, else the model's `save_pretrained`; a mapping becomes one file. Without `save`, `out`
    appears only when complete. Raises OutputError if `out` is taken or cannot be written, or space is short.
    """
    if save is not None:
        yield lambda: save(sft, out)
        return
    from ..output import paths  # not on every platform
    from ..output.write_errors import lack_of_space, output_errors

    out = paths.expanded(out)
    paths.check_name(out)
    if paths.is_occupied(out):
        raise OutputError(f"output {shown(out)} exists and is not empty; give another, or remove it")
    partial = paths.partial_of(out)
    if paths.is_occupied(partial) and not (partial / _MARK).exists():
        raise OutputError(f"{shown(partial)} exists, where the output is built; remove it, or give another output")
    state = sft if isinstance(sft, Mapping) else None
    tensors = {} if state is None else _unshared(state, open_checkpoint(base, "base", dry_run=True).tensors)
    held = (*sft.parameters(), *sft.buffers()) if state is None else tensors.values()
    lacking = lack_of_space({out: sum(each.nbytes for each in held)})
    if lacking:
        raise OutputError(lacking)

    def write() -> None:
        if state is None:
            sft.save_pretrained(partial)
        else:
            _save_tensors(tensors, partial / MODEL)
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    direct_io.sync(file.fileno())
        (partial / _MARK).unlink()
        direct_io.sync_folder(partial)
        partial.rename(out)
        direct_io.sync_folder(out.parent)

    with output_errors(out):
        new = direct_io.make_folder(partial)
    try:
        with paths.locked(partial, _BUSY):
            try:
                with output_errors(out):
                    for path in partial.iterdir():  # left by a killed save
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                    direct_io.write_file(partial / _MARK, b"")
                yield write
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        for folder in new[1:]:
            with suppress(OSError):
                folder.rmdir()  # if empty


def _unshared(state: Mapping[str, torch.Tensor], stored: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the tensors to save. A shared tensor keeps the names the base stores, or one if it stores none."""
    names: dict[Hashable, list[str]] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        names.setdefault(place if tensor.numel() else name, []).append(name)
    found: dict[str, torch.Tensor] = {}
    for each in names.values():
        found |= {name: state[name] for name in [n for n in each if unwrapped(n) in stored] or [tied_key(each)]}
    return {name: found[name] for name in state if name in found}


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():  # safetensors files cannot hold tensors that share memory
        apart[name] = tensor.contiguous()
        if apart[name].data_ptr() in seen:
            apart[name] = apart[name].clone()
        seen.add(apart[name].data_ptr())
    save_file(apart, path, {"format": "pt"})
