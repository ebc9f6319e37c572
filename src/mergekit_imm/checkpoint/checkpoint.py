"""An input of a merge, as its headers describe it: tensors by name, each read from one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.messages import shown
from ..common.notes import Note, note
from ..errors import CheckpointError
from ..model.tensor_names import folder_of
from .lazy_tensor import Tensor
from .model_files import Contents, Part, leave_out_option
from .safetensors_file import MODEL, Stamp, TensorFile, TensorInfo
from .sharded import SHARDING, from_shards


@dataclass(frozen=True)
class Checkpoint:
    """What a merge knows about one input before it reads a tensor."""

    role: str  # base, start or sft, for messages
    ref: str  # as typed
    folder: Path | None  # None in a dry run on a hub id
    files: dict[str, TensorFile]
    tensors: dict[str, Tensor]  # by name; what an adapter lacks is unchanged from the start
    config: dict[str, Any] | None = None
    side: Mapping[str, Path | None] = field(default_factory=dict)  # files to copy, by path within the folder
    left_out: tuple[str, ...] = ()  # files that are neither read nor copied
    parts: tuple[Part, ...] = ()  # files grouped as loaders group them
    recipe: dict[str, Any] | None = None  # of the merge that made it
    adapter: dict[str, Any] | None = None  # an adapter's config
    adapter_config: dict[str, Any] | None = None  # the same, as its file has it
    trained_on: Any = None  # the model an adapter's config names, a path or a hub id
    original_names: Mapping[str, str] = field(default_factory=dict)  # base's name -> differing name in the file
    repo: str | None = None
    commit: str | None = None
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)  # of the files that are read whole
    rows: tuple[int, int] | None = None  # of a resized vocabulary: as stored, as merged
    notes: tuple[Note, ...] = ()  # worth knowing, not errors
    part_configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # sub-folder -> its config.json
    adapters: tuple[str, ...] = ()  # sub-folders with an adapter, which is not part of the model
    unread: tuple[TensorInfo, ...] = ()  # stored but not used; a note says which

    @property
    def label(self) -> str:
        """Its role and where it came from, for messages."""
        return f"{self.role} {shown(self.ref)}"

    def config_of(self, folder: str) -> dict[str, Any] | None:
        """Return the config of the part in a folder ("" or "2_Dense/")."""
        return self.part_configs.get(folder) if folder else self.config

    @cached_property
    def file_of(self) -> dict[str, str]:
        """The file that holds each stored tensor."""
        return {tensor.name: file.name for file in self.files.values() for tensor in file.tensors}

    def path(self, tensor: TensorInfo) -> Path:
        """Return the file that holds a tensor."""
        path = self.files[tensor.file].path
        assert path is not None, "a dry run does not read tensors"
        return path


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
    contents: Contents,
    tensors: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """Return the checkpoint that open files make up, checked against their indexes.

    Tensors that the model's own files hold in pieces are joined, unless `tensors` has them.
    """
    label = f"{role} {shown(ref)}"
    for index, content in contents.indexes.items():
        of_index = [each for part in contents.parts if part.index == index for each in part.files] or [*contents.own]
        _check_index(content["weight_map"], files, of_index, index, label)
    own = {name: files[name] for name in contents.own}
    beside = [file for name, file in files.items() if name not in own]
    if tensors is None and any(SHARDING in file.metadata for file in own.values()):
        own, tensors = from_shards(own, role, label)
        files = files | own
    if tensors is None:
        tensors, unread = _by_name(files.values(), contents, role, ref)
    else:
        more, unread = _by_name(beside, contents, role, ref)
        twice = next((name for name in more if name in tensors), None)
        if twice is not None:
            raise _stored_twice(twice, "its own files", beside[0].name, role, ref)
        tensors |= more
    notes = [note for file in files.values() for note in file.notes]
    if unread:
        text = "{label} stores {count} tensors twice, first '{first}'; each is read from the file its index names"
        notes.append(note("stored twice", text, label=label, count=len(unread), first=shown(unread[0].name)))
    return Checkpoint(role, ref, folder, files, tensors, parts=contents.parts, unread=tuple(unread), notes=tuple(notes))


def _by_name(
    files: Iterable[TensorFile], contents: Contents, role: str, ref: str
) -> tuple[dict[str, Tensor], list[TensorInfo]]:
    """Return tensors by name, and the duplicates that an index says to read from another file."""
    tensors: dict[str, Tensor] = {}
    unread: list[TensorInfo] = []
    for file in files:
        for tensor in file.tensors:
            before = tensors.setdefault(tensor.name, tensor)
            if before is tensor:
                continue
            assert isinstance(before, TensorInfo)
            place = _place(tensor.name, contents.indexes)
            if place == before.file:
                unread.append(tensor)
            elif place == tensor.file:
                unread.append(before)
                tensors[tensor.name] = tensor
            else:
                raise _stored_twice(tensor.name, before.file, tensor.file, role, ref)
    return tensors, unread


def _place(name: str, indexes: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the file that the indexes name for a tensor."""
    for index, content in reversed([*indexes.items()]):
        folder = folder_of(index)
        file = content["weight_map"].get(name.removeprefix(folder)) if name.startswith(folder) else None
        if file is not None:
            return f"{folder}{file}"
    return None


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
    where_held: dict[str, str] = {}
    for name in own:
        names = [tensor.name for tensor in files[name].tensors]
        if folder:
            names = [each.removeprefix(folder) for each in names]
        where_held |= dict.fromkeys(names, name.removeprefix(folder))
    if weight_map == where_held:  # nearly always
        return
    held = {name.removeprefix(folder): {t.name.removeprefix(folder) for t in files[name].tensors} for name in own}
    stored = where_held.keys()
    if own == [MODEL] and weight_map.keys() != stored:
        raise CheckpointError(f"{where} holds both {MODEL} and {index}, with different tensors; delete the stale one")
    none: set[str] = set()
    for name, file in weight_map.items():
        if name not in held.get(file, none) and name not in held.get(MODEL, none):
            places = [each for each, names in held.items() if name in names]
            place = f"is in {shown(min(places))}" if places else "is in none of its files"
            raise CheckpointError(
                f"{where}: {index} says tensor '{shown(name)}' is in {shown(file)}, but it {place};"
                " download the model again, or delete a stale index"
            )
    unnamed = sorted(stored - weight_map.keys())
    if unnamed:
        raise CheckpointError(
            f"{where} stores {len(unnamed)} tensors that its {index} does not name, first"
            f" '{shown(unnamed[0])}'; download the model again, or delete a stale index"
        )
