"""An input of a merge: a folder, a safetensors file or a hub id, as far as headers tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from ..errors import CheckpointError, shown
from ..given import as_path
from ..json_input import is_utf8, parse_json, read_small
from ..recipe import RECIPE_FILE, parse_recipe, read_recipe
from . import hub
from .computed import Tensor
from .dcp import open_dcp
from .forms import ADAPTER_BIN, BIN_INDEX, bin_files, dcp_prefix, other_form
from .hub import ADAPTER, ADAPTER_CONFIG
from .pickled import open_pickled
from .pieces import are_shards, from_shards, is_sharded
from .sidefiles import is_side_file
from .tensorfile import INDEX, MODEL, Stamp, TensorFile, TensorInfo, is_plain_name, open_tensorfile, parse_header, stamp

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
    indexed: bool = False  # an index names the files
    recipe: dict[str, Any] | None = None  # of the merge that made it
    adapter: dict[str, Any] | None = None  # of an adapter: its config
    was: Mapping[str, str] = field(default_factory=dict)  # base's name -> its own in the file, where they differ
    repo: str | None = None
    commit: str | None = None
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)  # of all files that are read whole
    rows: tuple[int, int] | None = None  # of a vocabulary that is resized: as stored, and as merged
    notes: tuple[str, ...] = ()  # what is worth knowing and not an error
    laid_out: bool = True  # its files are such as an output can have

    @property
    def label(self) -> str:
        """How messages call it: its role and where it came from."""
        return f"{self.role} {shown(self.ref)}"

    @cached_property
    def _homes(self) -> dict[str, str]:
        return {tensor.name: file.name for file in self.files.values() for tensor in file.tensors}

    def home(self, name: str) -> str:
        """Return the file that holds a tensor, or the last one."""
        return self._homes.get(name) or list(self.files)[-1]

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
) -> Checkpoint:
    """Find and read the headers of a model: a local folder, a .safetensors file, or `org/name[@revision]`.

    An existing path wins over a hub id. A file is its tensors and nothing else. What lies in one of `outs`, if that
    is inside the folder, is not part of the model. Raises CheckpointError, one line that names the cure.
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
        return _from_folder(path, role, text, copy_code, outs)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{role} {shown(text)} is not a .safetensors file;"
                " convert it: load with transformers and `save_pretrained`"
            )
        file = open_tensorfile(path, path.name)
        return _assembled(role, text, path.parent, {path.name: file}, None, {}, ())
    if not is_hub_id(ref):
        raise CheckpointError(
            f"{role} {shown(text)} does not exist; give a folder, a .safetensors file or a hub id org/name[@revision]"
        )
    if dry_run:
        return _from_listing(hub.list_remote(text), role, text, copy_code)
    snapshot = hub.fetch(text, copy_code=copy_code)
    found = _from_folder(snapshot.folder, role, text, copy_code)
    return replace(found, repo=snapshot.repo, commit=snapshot.commit)


def _from_folder(folder: Path, role: str, ref: str, copy_code: bool, outs: Sequence[Path] = ()) -> Checkpoint:
    try:
        everything = sorted(_walk(folder, outs))
        folders = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{role} {shown(ref)} cannot be listed: {error.strerror}") from error
    strange = next((name for name in everything if not is_utf8(name)), None)
    if strange is not None:
        raise CheckpointError(
            f"{role} {shown(ref)} holds '{shown(strange)}', a name that is not valid UTF-8; rename or remove it"
        )
    top = [name for name in everything if "/" not in name]
    stamps = _stamps(folder, everything, copy_code)
    indexed_by = BIN_INDEX if bin_files(top) == [BIN_INDEX] else INDEX
    index = _json(folder / indexed_by) if indexed_by in top else None
    adapter = _adapter_file(top) if role == "sft" else None
    prefix = None if adapter else dcp_prefix(everything)
    names = [adapter] if adapter else [] if prefix is not None else _model_files(top, index, role, ref, folders)
    missing = [name for name in names if not (folder / name).exists()]
    if missing and (folder / missing[0]).is_symlink():
        raise CheckpointError(
            f"{role} {shown(ref)}: {shown(missing[0])} is a broken link; copy or download the model again"
        )
    if missing:
        raise CheckpointError(
            f"{role} {shown(ref)} lacks {shown(missing[0])} ({len(missing)} of {len(names)} files), which its"
            f" {indexed_by} names; copy or download it again"
        )
    files = {name: _opened(folder / name, name) for name in names}
    tensors: dict[str, Tensor] | None = None
    beside: tuple[str, ...] = ()
    if prefix is not None:
        files, tensors, beside = open_dcp(folder, prefix, role, f"{role} {shown(ref)}")
    side = {name: folder / name for name in everything if _is_side(name, copy_code)}
    unreadable = [name for name, path in side.items() if not path.is_file()]
    if unreadable:
        raise CheckpointError(
            f"{role} {shown(ref)}: {shown(unreadable[0])} is a broken link or no plain file; repair or remove it"
        )
    left = (*_left_out(everything, files, side), *beside)
    config = _json(folder / "config.json") if "config.json" in top else None
    if adapter:
        found = _assembled(role, ref, folder, files, config, side, left)
        return replace(found, stamps=stamps, adapter=_json(folder / ADAPTER_CONFIG))
    found = replace(_assembled(role, ref, folder, files, config, side, left, index, tensors), stamps=stamps)
    return replace(found, recipe=read_recipe(folder)) if role == "start" else found


def _from_listing(listing: hub.Listing, role: str, ref: str, copy_code: bool) -> Checkpoint:
    everything = sorted(listing.sizes)
    top = [name for name in everything if "/" not in name]
    small = {name: _parsed(content, f"{ref}/{name}") for name, content in listing.small.items()}
    index = small.get(INDEX)
    folders = sorted({PurePosixPath(name).parts[0] for name in everything if "/" in name})
    is_adapter = role == "sft" and _adapter_file(top) == ADAPTER
    files = {}
    for name in [ADAPTER] if is_adapter else _model_files(top, index, role, ref, folders):
        if name not in listing.headers:
            raise CheckpointError(f"{role} {shown(ref)} lacks {shown(name)} on the hub, which its {INDEX} names")
        files[name] = parse_header(listing.headers[name], name, listing.sizes[name], None)
    side: dict[str, Path | None] = {n: None for n in everything if _is_side(n, copy_code)}
    left = _left_out(everything, files, side)
    config = small.get("config.json")
    found = _assembled(role, ref, None, files, config, side, left, index)
    content = listing.small.get(RECIPE_FILE) if role == "start" else None
    recipe = None if content is None else parse_recipe(content, f"{ref}/{RECIPE_FILE}")
    adapter = small[ADAPTER_CONFIG] if is_adapter else None
    return replace(found, repo=listing.repo, commit=listing.commit, recipe=recipe, adapter=adapter)


def _opened(path: Path, name: str) -> TensorFile:
    return open_tensorfile(path, name) if name.endswith(".safetensors") else open_pickled(path, name)


def _adapter_file(top: list[str]) -> str | None:
    """The file of an adapter, if that is what a folder holds."""
    if ADAPTER_CONFIG not in top or MODEL in top or INDEX in top:
        return None
    return ADAPTER if ADAPTER in top else ADAPTER_BIN if ADAPTER_BIN in top and not bin_files(top) else None


def _model_files(top: list[str], index: dict[str, Any] | None, role: str, ref: str, folders: list[str]) -> list[str]:
    """Decide which files are the model, in the order in which they are read and written."""
    bins = bin_files(top)
    if bins and bins != [BIN_INDEX]:
        return bins
    if index is not None:
        named = _index_files(index, f"{ref}/{BIN_INDEX if bins else INDEX}", ".bin" if bins else ".safetensors")
        if MODEL not in top:
            return named
    if MODEL in top:
        return [MODEL]
    found = [n for n in top if n.endswith(".safetensors") and n != ADAPTER]
    if len(found) == 1 or are_shards(found):
        return found
    if found:
        raise CheckpointError(
            f"{role} {shown(ref)} holds neither {MODEL} nor {INDEX}, but {len(found)} other safetensors files"
            f" ({', '.join(map(shown, found[:4]))}{', …' if len(found) > 4 else ''}); give the one to use by its path"
        )
    form = other_form(top, folders, ref)
    if form is not None:
        raise CheckpointError(f"{role} {shown(ref)} holds {form}")
    checkpoints = [name for name in folders if re.fullmatch(r"checkpoint-\d+", name)]
    if checkpoints:
        latest = max(checkpoints, key=lambda name: int(name.rpartition("-")[2]))
        raise CheckpointError(
            f"{role} {shown(ref)} is a trainer's output folder without a model at its top; its latest is"
            f" {shown(str(PurePath(ref) / latest))}: give that"
        )
    raise CheckpointError(f"{role} {shown(ref)} holds no *.safetensors file; is it a model folder?")


def _index_files(index: dict[str, Any], where: str, suffix: str) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{shown(where)} has no weight_map; download it again, or delete it if it is stale")
    strange = [name for name in weight_map.values() if not isinstance(name, str)]
    names = strange[:1] or sorted(set(weight_map.values()))
    for name in names:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{shown(where)} names '{shown(name)}'; only plain names of files beside it are allowed"
            )
        if not name.endswith(suffix):
            kind = "safetensors" if suffix == ".safetensors" else suffix
            raise CheckpointError(f"{shown(where)} names '{shown(name)}', which is not a {kind} file")
    return names


def _assembled(
    role: str,
    ref: str,
    folder: Path | None,
    files: dict[str, TensorFile],
    config: dict[str, Any] | None,
    side: Mapping[str, Path | None],
    left_out: tuple[str, ...],
    index: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> Checkpoint:
    if tensors is None and is_sharded(files):
        files, tensors = from_shards(files, role, f"{role} {shown(ref)}")
    tensors = _by_name(files, role, ref) if tensors is None else tensors
    if index is not None:
        _check_index(index["weight_map"], files, _index_of(files), f"{role} {shown(ref)}")
    indexed = index is not None and MODEL not in files
    whole = all(name.endswith(".safetensors") for name in files) and not are_shards([*files])
    return Checkpoint(role, ref, folder, files, tensors, config, dict(side), left_out, indexed, laid_out=whole)


def _index_of(files: Iterable[str]) -> str:
    """The name of the index that would belong to files."""
    return BIN_INDEX if any(name.endswith(".bin") for name in files) else INDEX


def _by_name(files: Mapping[str, TensorFile], role: str, ref: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for file in files.values():
        for tensor in file.tensors:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{role} {shown(ref)} stores tensor '{shown(tensor.name)}' twice,"
                    f" in {shown(places[tensor.name])} and in {shown(file.name)}; remove one of the files"
                )
            tensors[tensor.name] = tensor
            places[tensor.name] = file.name
    return tensors


def _check_index(weight_map: dict[str, str], files: Mapping[str, TensorFile], named: str, where: str) -> None:
    places = {tensor.name: file.name for file in files.values() for tensor in file.tensors}
    if MODEL in files and set(weight_map) != set(places):
        raise CheckpointError(f"{where} holds both {MODEL} and {named}, with different tensors; delete the stale one")
    for name, file in weight_map.items():
        if places.get(name) not in (file, MODEL):
            place = f"lies in {shown(places[name])}" if name in places else "is in none of its files"
            raise CheckpointError(
                f"{where}: {named} says tensor '{shown(name)}' lies in {shown(file)}, but it {place};"
                " download the model again, or delete a stale index"
            )
    unnamed = sorted(set(places) - set(weight_map))
    if unnamed:
        raise CheckpointError(
            f"{where} stores {len(unnamed)} tensors that its {named} does not name, first"
            f" '{shown(unnamed[0])}'; download the model again, or delete a stale index"
        )


def _left_out(
    everything: list[str], files: Mapping[str, TensorFile], side: Mapping[str, Path | None]
) -> tuple[str, ...]:
    used = {*files, *side, _index_of(files)}
    return tuple(name for name in everything if name not in used)


def _stamps(folder: Path, everything: list[str], copy_code: bool) -> dict[Path, Stamp]:
    """Stamps of the small files, taken before they are read."""
    small = [
        name
        for name in everything
        if name in (INDEX, BIN_INDEX, RECIPE_FILE, ADAPTER_CONFIG) or _is_side(name, copy_code)
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
