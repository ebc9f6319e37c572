"""An input of a merge, as its headers describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.messages import shown
from ..common.notes import Note
from .lazy_tensor import Tensor
from .parts import Part
from .safetensors_file import Stamp, TensorFile, TensorInfo


@dataclass(frozen=True)
class Checkpoint:
    """What a merge knows about one input before it reads a tensor."""

    role: str  # base, start or sft, for messages
    ref: str  # as typed
    folder: Path | None  # None in a dry run on a hub id
    files: dict[str, TensorFile]
    tensors: dict[str, Tensor]  # by name; what an adapter lacks is unchanged from the start
    config: dict[str, Any] | None
    side: dict[str, Path | None]  # files to copy, by path within the folder
    left_out: tuple[str, ...]  # files that are neither read nor copied
    parts: tuple[Part, ...] = ()  # files grouped as loaders group them
    recipe: dict[str, Any] | None = None  # of the merge that made it
    adapter: dict[str, Any] | None = None  # an adapter's config
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
