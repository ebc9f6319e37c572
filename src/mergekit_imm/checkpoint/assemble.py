"""Assemble a checkpoint from its open files: tensors by name, each read from one place, checked against the indexes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..common.messages import shown
from ..common.notes import note
from ..errors import CheckpointError
from ..model.tensor_names import folder_of
from .checkpoint import Checkpoint
from .lazy_tensor import Tensor
from .parts import Part, leave_out_option
from .safetensors_file import MODEL, TensorFile, TensorInfo
from .sharded import from_shards, is_sharded


def in_part(file: TensorFile) -> TensorFile:
    """Return a file with its sub-folder prefixed to the names of its tensors."""
    folder = folder_of(file.name)
    if not folder:
        return file
    return replace(file, tensors=tuple(replace(each, name=folder + each.name) for each in file.tensors))


def assemble(
    role: str,
    ref: str,
    folder: Path | None,
    files: dict[str, TensorFile],
    config: dict[str, Any] | None,
    side: Mapping[str, Path | None],
    *,
    parts: tuple[Part, ...] = (),
    files_beside: Mapping[str, TensorFile] = MappingProxyType({}),
    indexes: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    tensors: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """Return the checkpoint that files make up; tensors sharded over ranks are joined unless `tensors` has them."""
    label = f"{role} {shown(ref)}"
    for index, content in indexes.items():
        own = [each for part in parts if part.index == index for each in part.files] or [*files]
        _check_index(content["weight_map"], {**files, **files_beside}, own, index, label)
    if tensors is None and is_sharded(files):
        files, tensors = from_shards(files, role, label)
    places = {
        f"{folder_of(index)}{name}": f"{folder_of(index)}{file}"
        for index, content in indexes.items()
        for name, file in content["weight_map"].items()
    }
    if tensors is None:
        tensors, unread = _by_name([*files.values(), *files_beside.values()], places, role, ref)
    else:
        more, unread = _by_name(files_beside.values(), places, role, ref)
        twice = next((name for name in more if name in tensors), None)
        if twice is not None:
            raise _stored_twice(twice, "its own files", next(iter(files_beside)), role, ref)
        tensors |= more
    notes = [note for file in (*files.values(), *files_beside.values()) for note in file.notes]
    if unread:
        text = "{label} stores {count} tensors twice, first '{first}'; each is read from the file its index names"
        notes.append(note("stored twice", text, label=label, count=len(unread), first=shown(unread[0].name)))
    return Checkpoint(
        role,
        ref,
        folder,
        {**files, **files_beside},
        tensors,
        config,
        dict(side),
        (),
        parts=parts or (Part(tuple(files)),),
        unread=tuple(unread),
        notes=tuple(notes),
    )


def _by_name(
    files: Iterable[TensorFile], places: Mapping[str, str], role: str, ref: str
) -> tuple[dict[str, Tensor], list[TensorInfo]]:
    """Return tensors by name, and the duplicates that an index says to read from another file."""
    tensors: dict[str, Tensor] = {}
    unread = []
    file_of: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name not in file_of:
                pass
            elif places.get(tensor.name) == file_of[tensor.name]:
                unread.append(tensor)
                continue
            elif places.get(tensor.name) == file.name:
                before = tensors[tensor.name]
                assert isinstance(before, TensorInfo)
                unread.append(before)
            else:
                raise _stored_twice(tensor.name, file_of[tensor.name], file.name, role, ref)
            tensors[tensor.name] = tensor
            file_of[tensor.name] = file.name
    return tensors, unread


def _stored_twice(name: str, one: str, other: str, role: str, ref: str) -> CheckpointError:
    return CheckpointError(
        f"{role} {shown(ref)} stores tensor '{shown(name)}' twice, in {shown(one)} and in {shown(other)}; leave one of"
        f" the files out, {leave_out_option(other)}, or remove it"
    )


def _check_index(
    weight_map: dict[str, str], files: Mapping[str, TensorFile], own: Sequence[str], index: str, where: str
) -> None:
    """Check that an index agrees with the headers of the files it names, `own`."""
    folder = folder_of(index)
    places: dict[str, set[str]] = {}
    for name in own:
        for tensor in files[name].tensors:
            places.setdefault(tensor.name.removeprefix(folder), set()).add(name.removeprefix(folder))
    if own == [MODEL] and set(weight_map) != set(places):
        raise CheckpointError(f"{where} holds both {MODEL} and {index}, with different tensors; delete the stale one")
    for name, file in weight_map.items():
        if not places.get(name, set()) & {file, MODEL}:
            place = f"is in {shown(min(places[name]))}" if name in places else "is in none of its files"
            raise CheckpointError(
                f"{where}: {index} says tensor '{shown(name)}' is in {shown(file)}, but it {place};"
                " download the model again, or delete a stale index"
            )
    unnamed = sorted(set(places) - set(weight_map))
    if unnamed:
        raise CheckpointError(
            f"{where} stores {len(unnamed)} tensors that its {index} does not name, first"
            f" '{shown(unnamed[0])}'; download the model again, or delete a stale index"
        )
