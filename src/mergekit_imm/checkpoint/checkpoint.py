"""An input of a merge: a folder, a safetensors file or a hub id, as far as headers tell."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from ..checkpoint import hub
from ..common.checks import as_path
from ..common.json_files import is_utf8, parse_json, read_small
from ..common.messages import shown
from ..errors import CheckpointError
from ..model.tensor_names import folder_of
from ..options.recipe import RECIPE_FILE, parse_recipe, read_recipe
from .dcp import open_dcp
from .detect import ADAPTER_BIN, BIN, BIN_INDEX, bin_files, dcp_prefix, no_model
from .hub import ADAPTER, ADAPTER_CONFIG
from .lazy_tensor import Tensor
from .parts import (
    ADAPTERS,
    READ,
    Part,
    component,
    holds_parts,
    index_files,
    is_aside,
    matches,
    parts_below,
    parts_beside,
)
from .safetensors_file import (
    INDEX,
    MODEL,
    Stamp,
    TensorFile,
    TensorInfo,
    open_tensorfile,
    parse_header,
    stamp,
)
from .sharded import are_shards, from_shards, is_sharded
from .side_files import is_side_file
from .torch_file import open_pickled

_DEPTH = 64  # of folders in a model


@dataclass(frozen=True)
class Checkpoint:
    """What a merge knows of one input before it reads a tensor."""

    role: str  # base, start or sft, for messages
    ref: str  # as the user typed it
    folder: Path | None  # None: a dry run on a hub id
    files: dict[str, TensorFile]
    tensors: dict[str, Tensor]  # by name; what an adapter does not hold is as in the start
    config: dict[str, Any] | None
    side: dict[str, Path | None]  # copied files, by their path within the folder
    left_out: tuple[str, ...]  # files that are neither weights of this model nor copied
    parts: tuple[Part, ...] = ()  # which of the files belong together
    recipe: dict[str, Any] | None = None  # of the merge that made it
    adapter: dict[str, Any] | None = None  # of an adapter: its config
    trained_on: Any = None  # of an adapter: the model that it names, a path or a hub id
    original_names: Mapping[str, str] = field(
        default_factory=dict
    )  # base's name -> its own in the file, where they differ
    repo: str | None = None
    commit: str | None = None
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)  # of all files that are read whole
    rows: tuple[int, int] | None = None  # of a vocabulary that is resized: as stored, and as merged
    notes: tuple[str, ...] = ()  # what is worth knowing and not an error
    part_configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # of sub-folders: folder -> config.json
    adapters: tuple[str, ...] = ()  # sub-folders that hold an adapter, which is no part of the model
    unread: tuple[TensorInfo, ...] = ()  # tensors of its files that are none of the model's; a note says which

    @property
    def label(self) -> str:
        """How messages call it: its role and where it came from."""
        return f"{self.role} {shown(self.ref)}"

    def config_of(self, folder: str) -> dict[str, Any] | None:
        """Return the config of a part of the model, by its folder ("" or "2_Dense/")."""
        return self.part_configs.get(folder) if folder else self.config

    @cached_property
    def homes(self) -> dict[str, str]:
        """The file that holds each stored tensor."""
        return {tensor.name: file.name for file in self.files.values() for tensor in file.tensors}

    def path(self, tensor: TensorInfo) -> Path:
        """Return the file that holds a tensor."""
        path = self.files[tensor.file].path
        assert path is not None, "a dry run does not read tensors"
        return path


def is_hub_id(ref: str | Path) -> bool:
    """Whether an input is on a hub: it has the form of a hub id, and no such path exists."""
    if isinstance(ref, PurePath) or hub.split_ref(str(ref)) is None:
        return False
    try:
        return not Path(ref).exists()
    except OSError:
        return False


def open_checkpoint(
    ref: str | Path,
    role: str,
    *,
    copy_code: bool = False,
    dry_run: bool = False,
    outs: Sequence[Path] = (),
    leave_out: Sequence[str] = (),
) -> Checkpoint:
    """Find and read the headers of a model: a local folder, a .safetensors file, or `org/name[@revision]`.

    An existing path wins over a hub id. A file is its tensors and nothing else. What lies in one of `outs`, if that
    is inside the folder, is not part of the model, nor what `leave_out` names: files and folders by their path in the
    model, or patterns of such. Raises CheckpointError, one line that names the cure.
    """
    text = str(as_path(role, ref))
    text = text.rstrip("/") or text  # a shell's completion adds one; it is no other model
    if not text:
        raise CheckpointError(f"{role} is empty; give a folder, a .safetensors file or a hub id org/name[@revision]")
    try:
        path = Path(text).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{role} {shown(text)} cannot be opened: {getattr(error, 'strerror', error)}") from error
    if path.is_dir():
        return _from_folder(path, role, text, copy_code, outs, leave_out)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{role} {shown(text)} is not a .safetensors file;"
                " convert it: load with transformers and `save_pretrained`"
            )
        file = open_tensorfile(path, path.name)
        return _assembled(role, text, path.parent, {path.name: file}, None, {})
    if not is_hub_id(ref):
        raise CheckpointError(
            f"{role} {shown(text)} does not exist; give a folder, a .safetensors file or a hub id org/name[@revision]"
        )
    if dry_run:
        return _from_listing(hub.list_remote(text, leave_out), role, text, copy_code, leave_out)
    snapshot = hub.fetch(text, copy_code=copy_code, leave_out=leave_out)
    found = _from_folder(snapshot.folder, role, text, copy_code, leave_out=leave_out)
    left_out = (*found.left_out, *(name for name in snapshot.left_out if name not in found.left_out))
    return replace(found, repo=snapshot.repo, commit=snapshot.commit, left_out=left_out)


def _from_folder(
    folder: Path, role: str, ref: str, copy_code: bool, outs: Sequence[Path] = (), leave_out: Sequence[str] = ()
) -> Checkpoint:
    label = f"{role} {shown(ref)}"
    try:
        listed = sorted(_walk(folder, outs))
    except OSError as error:
        raise CheckpointError(f"{label} cannot be listed: {error.strerror}") from error
    strange = next((name for name in listed if not is_utf8(name)), None)
    if strange is not None:
        raise CheckpointError(f"{label} holds '{shown(strange)}', a name that is not valid UTF-8; rename or remove it")
    everything = [name for name in listed if not matches(name, leave_out)]
    _check_links(folder, everything, label)
    top = [name for name in everything if "/" not in name]
    stamps = _stamps(folder, everything, copy_code)
    indexed_by = BIN_INDEX if bin_files(top) == [BIN_INDEX] else INDEX
    index = _json(folder / indexed_by) if indexed_by in top else None
    adapter = _adapter_file(top) if role == "sft" else None
    prefix = None if adapter else dcp_prefix(everything)
    own = None if adapter or prefix is not None else component(top, lambda path: _json(folder / path))
    if own is None:
        whose = f"{ref} without what --leave-out names" if len(everything) < len(listed) else ref
        names = (
            [adapter] if adapter else [] if prefix is not None else _model_files(top, index, role, whose, everything)
        )
        own = Part(tuple(names), index=indexed_by if index is not None and MODEL not in names else None)
    names = [*own.files]
    beside, adapters = parts_below(everything, lambda path: _json(folder / path))
    beside = parts_beside(top, names) + beside
    for part in (own, *beside):
        _check_there(folder, part, label, leave_out)
    files = {name: _opened(folder / name, name) for name in names}
    tensors: dict[str, Tensor] | None = None
    others: tuple[str, ...] = ()
    if prefix is not None:
        files, tensors, others = open_dcp(folder, prefix, role, label)
        own = Part(tuple(files))
    if not own.files and not beside:
        raise CheckpointError(f"{label} {no_model(everything, ref)}")
    files_beside = {name: _opened_beside(folder / name, name, label) for part in beside for name in part.files}
    side = {
        name: folder / name
        for name in everything
        if _is_side(name, copy_code) or (name.startswith(tuple(adapters)) and not name.endswith("/"))
    }
    unreadable = [name for name, path in side.items() if not path.is_file()]
    if unreadable:
        raise CheckpointError(f"{label}: {shown(unreadable[0])} is a broken link or no plain file; repair or remove it")
    indexes = {} if index is None or adapter else {indexed_by: index}
    indexes |= {path: _json(folder / path) for part in (own, *beside) if (path := part.index) and path not in indexes}
    found = _assembled(
        role, ref, folder, files, _json(folder / "config.json") if "config.json" in top else None, side,
        parts=((own, *beside) if own.files else tuple(beside)), files_beside=files_beside, indexes=indexes,
        tensors=tensors,
    )  # fmt: skip
    configs = {f"{part.folder}config.json" for part in beside} & set(everything)
    said = _json(folder / ADAPTER_CONFIG) if adapter else None
    return replace(
        found,
        stamps=stamps,
        left_out=(*_left_out(listed, found), *others),
        adapter=said,
        trained_on=said.get("base_model_name_or_path") if said else None,
        adapters=tuple(adapters),
        part_configs={folder_of(path): _json(folder / path) for path in sorted(configs) if "/" in path},
        recipe=read_recipe(folder) if role == "start" else None,
        notes=(*found.notes, *_note_of_adapter(top, adapter, label)),
    )


def _check_there(folder: Path, part: Part, label: str, leave_out: Sequence[str]) -> None:
    """Raise CheckpointError for a file that an index names and that is not there, or is to be left out."""
    shard = next((name for name in part.files if matches(name, leave_out)), None)
    if shard is not None:
        raise CheckpointError(
            f"--leave-out names {shown(shard)} of {label}, which {part.index or INDEX} names too: a model is read with"
            " all of its shards; leave out none of them, or all and their index"
        )
    missing = [name for name in part.files if not (folder / name).exists()]
    if missing and (folder / missing[0]).is_symlink():
        raise CheckpointError(f"{label}: {shown(missing[0])} is a broken link; copy or download the model again")
    if missing:
        raise CheckpointError(
            f"{label} lacks {shown(missing[0])} ({len(missing)} of {len(part.files)} files), which its"
            f" {part.index or INDEX} names; copy or download it again"
        )


def _check_links(folder: Path, everything: Sequence[str], label: str) -> None:
    """Raise CheckpointError for a link to a folder elsewhere that holds weights: links to folders are not followed."""
    for name in everything:
        if not name.endswith("/") or is_aside(name.rstrip("/")):
            continue
        linked = (folder / name).resolve()
        if linked.is_relative_to(folder.resolve()):  # what it leads to is found there
            continue
        with suppress(OSError):
            weights = next((each.name for each in linked.iterdir() if each.name.endswith(READ)), None)
            if weights is not None:
                raise CheckpointError(
                    f"{label} holds weights, {shown(weights)}, in {shown(name)}, a link to another folder, which is not"
                    f" followed: put a copy in its place, or leave it out: {leave_out_option(name)}"
                )


def _note_of_adapter(top: Sequence[str], adapter: str | None, label: str) -> list[str]:
    found = next((name for name in ADAPTERS if name in top), None)
    if found is None or adapter is not None:
        return []
    return [f"note: {label} holds an adapter beside its weights, {found}, which is not merged"]


def _from_listing(
    listing: hub.Listing, role: str, ref: str, copy_code: bool, leave_out: Sequence[str] = ()
) -> Checkpoint:
    everything = sorted(name for name in listing.sizes if not matches(name, leave_out))
    top = [name for name in everything if "/" not in name]
    small = {name: _parsed(content, f"{ref}/{name}") for name, content in listing.small.items()}
    index = small.get(INDEX)
    is_adapter = role == "sft" and _adapter_file(top) == ADAPTER
    own = None if is_adapter else component(top, small.__getitem__)
    if own is None:
        names = [ADAPTER] if is_adapter else _model_files(top, index, role, ref, everything)
        own = Part(tuple(names), index=INDEX if index is not None and MODEL not in names else None)
    names = [*own.files]
    beside, adapters = parts_below(everything, small.__getitem__)
    beside = parts_beside(top, names) + beside
    if not own.files and not beside:
        raise CheckpointError(f"{role} {shown(ref)} {no_model(everything, ref)}")
    files = {}
    for part in (own, *beside):
        for name in part.files:
            if name not in listing.headers:
                raise CheckpointError(
                    f"{role} {shown(ref)} lacks {shown(name)} on the hub, which its {part.index or INDEX} names"
                )
            files[name] = in_part(parse_header(listing.headers[name], name, listing.sizes[name], None))
    side: dict[str, Path | None] = {
        n: None for n in everything if _is_side(n, copy_code) or n.startswith(tuple(adapters))
    }
    indexes = {path: small[path] for part in (own, *beside) if (path := part.index)}
    if index is not None and not is_adapter:
        indexes[INDEX] = index
    found = _assembled(
        role, ref, None, {name: files.pop(name) for name in names}, small.get("config.json"), side,
        parts=((own, *beside) if own.files else tuple(beside)), files_beside=files, indexes=indexes,
    )  # fmt: skip
    content = listing.small.get(RECIPE_FILE) if role == "start" else None
    return replace(
        found,
        repo=listing.repo,
        commit=listing.commit,
        left_out=_left_out(sorted(listing.sizes), found),
        recipe=None if content is None else parse_recipe(content, f"{ref}/{RECIPE_FILE}"),
        adapter=small[ADAPTER_CONFIG] if is_adapter else None,
        trained_on=small[ADAPTER_CONFIG].get("base_model_name_or_path") if is_adapter else None,
        adapters=tuple(adapters),
        part_configs={
            folder_of(n): small[n] for part in beside if (n := f"{part.folder}config.json") in small and part.folder
        },
        notes=(*found.notes, *_note_of_adapter(top, ADAPTER if is_adapter else None, f"{role} {shown(ref)}")),
    )


def _opened(path: Path, name: str) -> TensorFile:
    return in_part(open_tensorfile(path, name) if name.endswith(".safetensors") else open_pickled(path, name))


def _opened_beside(path: Path, name: str, label: str) -> TensorFile:
    """Open a file that lies beside a model's own, which may be none of its weights."""
    try:
        return _opened(path, name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; if it is none of the weights of {label}, leave it out: {leave_out_option(name)}"
        ) from error


def in_part(file: TensorFile) -> TensorFile:
    """Return a file of a part with the path in the model before its tensors' names."""
    folder = folder_of(file.name)
    if not folder:
        return file
    return replace(file, tensors=tuple(replace(each, name=folder + each.name) for each in file.tensors))


def leave_out_option(*paths: str) -> str:
    """Return the options that leave files out, as they can be pasted into a shell."""
    return " ".join(f"--leave-out {quoted(path)}" for path in paths)


def quoted(path: str) -> str:
    """Return a path as a word of a shell, in quotes: messages for Python show it in a list."""
    word = shlex.quote(path)
    return word if word.startswith("'") else f"'{word}'"


def _adapter_file(top: list[str]) -> str | None:
    """The file of an adapter, if that is what a folder holds."""
    if ADAPTER_CONFIG not in top or MODEL in top or INDEX in top:
        return None
    return ADAPTER if ADAPTER in top else ADAPTER_BIN if ADAPTER_BIN in top and not bin_files(top) else None


def _model_files(top: list[str], index: dict[str, Any] | None, role: str, ref: str, everything: list[str]) -> list[str]:
    """Decide which files are the model, in the order in which they are read and written."""
    bins = bin_files(top)
    if bins and bins != [BIN_INDEX]:
        return bins
    if index is not None:
        named = index_files(index, f"{ref}/{BIN_INDEX if bins else INDEX}", ".bin" if bins else ".safetensors")
        if MODEL not in top:
            return named
    if MODEL in top:
        return [MODEL]
    if holds_parts(top):
        return []  # whatever lies there, lies beside the parts
    found = [n for n in top if n.endswith(".safetensors") and n != ADAPTER]
    if len(found) == 1 or are_shards(found):
        return found
    if found:
        raise CheckpointError(
            f"{role} {shown(ref)} holds neither {MODEL} nor {INDEX}, but {len(found)} other safetensors files"
            f" ({', '.join(map(shown, found[:4]))}{', …' if len(found) > 4 else ''}); give the one to use by its path"
        )
    raise CheckpointError(f"{role} {shown(ref)} {no_model(everything, ref)}")


def _assembled(
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
    """Put together what was found. The tensors of pieces, if not given, are those that the files tell of."""
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
        notes.append(
            f"note: {label} stores {len(unread)} tensors twice, first '{shown(unread[0].name)}'; each is read from the"
            " file that its index names"
        )
    return Checkpoint(
        role, ref, folder, {**files, **files_beside}, tensors, config, dict(side), (),
        parts=parts or (Part(tuple(files)),), unread=tuple(unread), notes=tuple(notes),
    )  # fmt: skip


def _by_name(
    files: Iterable[TensorFile], places: Mapping[str, str], role: str, ref: str
) -> tuple[dict[str, Tensor], list[TensorInfo]]:
    """Return the tensors of files by name, and those that an index says are read from another file."""
    tensors: dict[str, Tensor] = {}
    unread = []
    homes: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name not in homes:
                pass
            elif places.get(tensor.name) == homes[tensor.name]:
                unread.append(tensor)
                continue
            elif places.get(tensor.name) == file.name:
                before = tensors[tensor.name]
                assert isinstance(before, TensorInfo)
                unread.append(before)
            else:
                raise _stored_twice(tensor.name, homes[tensor.name], file.name, role, ref)
            tensors[tensor.name] = tensor
            homes[tensor.name] = file.name
    return tensors, unread


def _stored_twice(name: str, one: str, other: str, role: str, ref: str) -> CheckpointError:
    return CheckpointError(
        f"{role} {shown(ref)} stores tensor '{shown(name)}' twice, in {shown(one)} and in {shown(other)}; leave one of"
        f" the files out, {leave_out_option(other)}, or remove it"
    )


def _check_index(
    weight_map: dict[str, str], files: Mapping[str, TensorFile], own: Sequence[str], index: str, where: str
) -> None:
    """Check that an index is one of the files that it names: `own`, by their path in the model."""
    folder = folder_of(index)
    places: dict[str, set[str]] = {}
    for name in own:
        for tensor in files[name].tensors:
            places.setdefault(tensor.name.removeprefix(folder), set()).add(name.removeprefix(folder))
    if own == [MODEL] and set(weight_map) != set(places):
        raise CheckpointError(f"{where} holds both {MODEL} and {index}, with different tensors; delete the stale one")
    for name, file in weight_map.items():
        if not places.get(name, set()) & {file, MODEL}:
            place = f"lies in {shown(min(places[name]))}" if name in places else "is in none of its files"
            raise CheckpointError(
                f"{where}: {index} says tensor '{shown(name)}' lies in {shown(file)}, but it {place};"
                " download the model again, or delete a stale index"
            )
    unnamed = sorted(set(places) - set(weight_map))
    if unnamed:
        raise CheckpointError(
            f"{where} stores {len(unnamed)} tensors that its {index} does not name, first"
            f" '{shown(unnamed[0])}'; download the model again, or delete a stale index"
        )


def _left_out(everything: list[str], found: Checkpoint) -> tuple[str, ...]:
    used = {*found.files, *found.side, *(part.index for part in found.parts)}
    used |= {INDEX} if MODEL in found.files else {BIN_INDEX} if BIN in found.files else set()
    return tuple(name for name in everything if name not in used)


def _stamps(folder: Path, everything: list[str], copy_code: bool) -> dict[Path, Stamp]:
    """Stamps of the small files, taken before they are read."""
    small = [
        name
        for name in everything
        if name in (RECIPE_FILE, ADAPTER_CONFIG) or ".index." in name or _is_side(name, copy_code)
    ]
    found = {}
    for path in (folder / name for name in small):
        with suppress(OSError):  # what cannot be read is told when it is
            found[path] = stamp(path)
    return found


def _walk(folder: Path, outs: Sequence[Path], prefix: str = "") -> list[str]:
    """Paths of all files below a folder, relative, with forward slashes.

    Not entered: other merges and `outs`; and hidden and linked folders, which are listed with a slash at the
    end.
    """
    if prefix.count("/") > _DEPTH:
        raise CheckpointError(f"{shown(folder)} lies more than {_DEPTH} folders deep in a model; move it away")
    found = []
    for entry in folder.iterdir():
        if not entry.is_dir():
            found.append(prefix + entry.name)
        elif entry.is_symlink() or entry.name.startswith("."):
            found.append(f"{prefix}{entry.name}/")
        elif not (
            entry.name.endswith(".partial")
            or (entry / "imm_recipe.json").exists()
            or any(out.exists() and entry.samefile(out) for out in outs)
        ):
            found += _walk(entry, outs, f"{prefix}{entry.name}/")
    return found


def _is_side(name: str, copy_code: bool) -> bool:
    return not name.endswith("/") and is_side_file(name, copy_code=copy_code)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_small(path)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}; copy or download it again") from error
    return _parsed(content, str(path))


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{shown(where)} is not JSON: {shown(error, 200)}; copy or download it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{shown(where)} is not a JSON object; copy or download it again")
    return parsed
