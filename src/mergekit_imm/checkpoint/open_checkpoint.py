"""Open an input of a merge: a folder, a safetensors file or a hub id. Reads headers only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import Any

from ..checkpoint import hub
from ..common.checks import as_path
from ..common.json_files import is_utf8, parse_json, read_small
from ..common.messages import shown
from ..common.notes import note
from ..errors import CheckpointError
from ..model.config import CONFIG
from ..model.tensor_names import folder_of
from ..options.recipe import RECIPE_FILE, parse_recipe, read_recipe
from .checkpoint import Checkpoint, assemble, in_part
from .dcp import open_dcp
from .lazy_tensor import Tensor
from .lfs_pointer import check_no_pointer
from .model_files import (
    ADAPTERS,
    READ,
    Contents,
    Part,
    ReadJson,
    is_aside,
    is_side_file,
    leave_out_option,
    matches,
    no_model_file,
    sort_files,
)
from .other_formats import adapter_file
from .safetensors_file import ADAPTER_CONFIG, INDEX, MODEL, Stamp, TensorFile, open_tensorfile, parse_header, stamp
from .torch_file import BIN, BIN_INDEX, open_torch_file

_DEPTH = 64  # of folders in a model


def is_hub_id(ref: str | Path) -> bool:
    """Whether an input is a hub id: it has the form of one, and no such path exists."""
    if isinstance(ref, PurePath):
        return False
    try:
        return not Path(ref).exists() and hub.split_ref(ref) is not None
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
    indexes: dict[bytes, Any] | None = None,
) -> Checkpoint:
    """Read the headers of a model: a local folder, a .safetensors file, or `org/name[@revision]`.

    An existing path wins over a hub id. A single file has tensors only, no config. Folders in `outs` and files or
    folders that match `leave_out` (paths in the model, or patterns) are not part of the model. `indexes` keeps parsed
    indexes by digest, for models stored alike that are opened together. Raises CheckpointError.
    """
    text = str(as_path(role, ref))
    text = text.rstrip("/") or text  # shell completion adds a slash
    if not text:
        raise CheckpointError(f"{role} is empty; give a folder, a .safetensors file or a hub id org/name[@revision]")
    try:
        path = Path(text).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{role} {shown(text)} cannot be opened: {getattr(error, 'strerror', error)}") from error
    if path.is_dir():
        return _from_folder(path, role, text, copy_code, outs, leave_out, indexes)
    if path.is_file():
        if path.suffix != ".safetensors" or path.name in ADAPTERS:
            raise CheckpointError(f"{role} {shown(text)} {_instead_of(path, role, str(PurePath(text).parent))}")
        file = open_tensorfile(path, path.name)
        whole = Contents((path.name,), (Part((path.name,)),), (path.name,))
        return assemble(role, text, path.parent, {path.name: file}, whole)
    if not is_hub_id(ref):
        raise CheckpointError(
            f"{role} {shown(text)} does not exist; give a folder, a .safetensors file or a hub id org/name[@revision]"
        )
    try:
        if dry_run:
            listing = hub.list_remote(text, leave_out)
        else:
            snapshot = hub.fetch(text, copy_code=copy_code, leave_out=leave_out)
    except CheckpointError as error:
        raise CheckpointError(f"{role} {error.args[0]}") from error
    if dry_run:
        return _from_listing(listing, role, text, copy_code, leave_out)
    found = _from_folder(snapshot.folder, role, text, copy_code, leave_out=leave_out)
    left_out = (*found.left_out, *(name for name in snapshot.left_out if name not in found.left_out))
    return replace(found, repo=snapshot.repo, commit=snapshot.commit, left_out=left_out)


def _instead_of(path: Path, role: str, folder: str) -> str:
    """Say what to give instead of a file; `folder` is where it is, as typed."""
    beside = []
    with suppress(OSError):
        beside = [each.name for each in path.parent.iterdir()]
    if path.name in ADAPTERS:
        return adapter_file(beside, role, folder)
    return no_model_file(path.name, beside, role, folder)


def _from_folder(
    folder: Path,
    role: str,
    ref: str,
    copy_code: bool,
    outs: Sequence[Path] = (),
    leave_out: Sequence[str] = (),
    indexes: dict[bytes, Any] | None = None,
) -> Checkpoint:
    label = f"{role} {shown(ref)}"
    try:
        listed = sorted(_walk(folder, outs))
    except OSError as error:
        raise CheckpointError(f"{label} cannot be listed: {error.strerror}") from error
    invalid = next((name for name in listed if not is_utf8(name)), None)
    if invalid is not None:
        raise CheckpointError(f"{label} holds '{shown(invalid)}', a name that is not valid UTF-8; rename or remove it")
    paths = [name for name in listed if not matches(name, leave_out)]
    _check_links(folder, paths, label)
    stamps = _stamps_of(folder, paths, copy_code)

    def read(path: str) -> dict[str, Any]:
        whole = folder / path
        try:
            content = read_small(whole)
        except OSError as error:
            raise CheckpointError(
                f"{shown(whole)} cannot be read: {error.strerror}; copy or download it again"
            ) from error
        check_no_pointer(whole, content)
        if indexes is None or path not in (INDEX, BIN_INDEX):
            return _parse_json_object(content, str(whole))
        digest = blake2b(content).digest()
        if digest not in indexes:
            indexes[digest] = _parse_json_object(content, str(whole))
        return indexes[digest]  # type: ignore[no-any-return]

    given = f"{label} without what --leave-out names" if len(paths) < len(listed) else label

    def every() -> list[str]:
        return [name for name in sorted(_walk(folder, outs, with_merges=True)) if not matches(name, leave_out)]

    contents = sort_files(paths, read, role, ref, given, copy_code=copy_code, every=every)
    for part in contents.parts:
        _check_complete(folder, part, label, leave_out)
    files = {name: _opened(folder / name, name) for name in contents.own}
    tensors: dict[str, Tensor] | None = None
    others: tuple[str, ...] = ()
    if contents.dcp is not None:
        files, tensors, others = open_dcp(folder, contents.dcp, role, label)
        contents = replace(contents, parts=(Part(tuple(files)), *contents.parts), own=tuple(files))
    for name in (name for part in contents.parts for name in part.files if name not in files):
        try:
            files[name] = _opened(folder / name, name)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; if it is not part of {label}, leave it out: {leave_out_option(name)}"
            ) from error
    unreadable = next((name for name in contents.side if not (folder / name).is_file()), None)
    if unreadable is not None:
        raise CheckpointError(f"{label}: {shown(unreadable)} is a broken link or not a plain file; repair or remove it")
    found = _checkpoint(role, ref, folder, files, contents, listed, read, tensors)
    recipe = read_recipe(folder) if role == "start" else None
    return replace(found, stamps=stamps, left_out=(*found.left_out, *others), recipe=recipe)


def _from_listing(
    listing: hub.Listing, role: str, ref: str, copy_code: bool, leave_out: Sequence[str] = ()
) -> Checkpoint:
    label = f"{role} {shown(ref)}"
    paths = sorted(name for name in listing.sizes if not matches(name, leave_out))
    small = {name: _parse_json_object(content, f"{ref}/{name}") for name, content in listing.small.items()}
    read = small.__getitem__
    contents = sort_files(paths, read, role, ref, label, copy_code=copy_code, with_torch=False)
    files = {}
    for part in contents.parts:
        for name in part.files:
            if name not in listing.headers:
                raise CheckpointError(f"{label} lacks {shown(name)} on the hub, which its {part.index or INDEX} names")
            files[name] = in_part(parse_header(listing.headers[name], name, listing.sizes[name], None))
    found = _checkpoint(role, ref, None, files, contents, sorted(listing.sizes), read)
    content = listing.small.get(RECIPE_FILE) if role == "start" else None
    recipe = None if content is None else parse_recipe(content, f"{ref}/{RECIPE_FILE}")
    return replace(found, repo=listing.repo, commit=listing.commit, recipe=recipe)


def _checkpoint(
    role: str,
    ref: str,
    folder: Path | None,
    files: dict[str, TensorFile],
    contents: Contents,
    listed: Sequence[str],
    read: ReadJson,
    tensors: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """Return the checkpoint that open files make up, with what its small files say."""
    config = read(CONFIG) if CONFIG in contents.paths else None
    found = assemble(role, ref, folder, files, contents, tensors)
    adapter = read(ADAPTER_CONFIG) if contents.adapter else None
    configs = sorted({f"{part.folder}{CONFIG}" for part in contents.parts if part.folder} & {*contents.paths})
    notes = found.notes
    ignored = next((name for name in ADAPTERS if name in contents.paths), None)
    if ignored is not None and adapter is None:
        text = "{label} holds an adapter beside its weights, {file}, which is not merged"
        notes = (*notes, note("adapter not merged", text, label=found.label, file=ignored))
    used = {*files, *contents.side, *(part.index for part in contents.parts)}
    used |= {INDEX} if MODEL in files else {BIN_INDEX} if BIN in files else set()
    return replace(
        found,
        config=config,
        side={name: folder / name if folder else None for name in contents.side},
        left_out=tuple(name for name in listed if name not in used),
        adapter=adapter,
        adapter_config=adapter,
        trained_on=adapter.get("base_model_name_or_path") if adapter else None,
        adapters=contents.adapters,
        part_configs={folder_of(path): read(path) for path in configs},
        notes=notes,
    )


def _opened(path: Path, name: str) -> TensorFile:
    return in_part(open_tensorfile(path, name) if name.endswith(".safetensors") else open_torch_file(path, name))


def _walk(folder: Path, outs: Sequence[Path], prefix: str = "", *, with_merges: bool = False) -> list[str]:
    """Return the relative paths of all files in a folder and below, with forward slashes.

    Other merges, unless asked for, and `outs` are skipped. Hidden and linked folders are not entered; they are listed
    with a trailing slash.
    """
    if prefix.count("/") > _DEPTH:
        raise CheckpointError(f"{shown(folder)} is more than {_DEPTH} folders deep in a model; move it away")
    found = []
    for entry in folder.iterdir():
        if not entry.is_dir():
            found.append(prefix + entry.name)
        elif entry.is_symlink() or entry.name.startswith("."):
            found.append(f"{prefix}{entry.name}/")
        elif not (
            entry.name.endswith(".partial")
            or ((entry / RECIPE_FILE).exists() and not with_merges)
            or any(out.exists() and entry.samefile(out) for out in outs)
        ):
            found += _walk(entry, outs, f"{prefix}{entry.name}/", with_merges=with_merges)
    return found


def _check_links(folder: Path, everything: Sequence[str], label: str) -> None:
    """Raise CheckpointError for a link to a folder of weights elsewhere: links to folders are not followed."""
    for name in everything:
        if not name.endswith("/") or is_aside(name.rstrip("/")):
            continue
        linked = (folder / name).resolve()
        if linked.is_relative_to(folder.resolve()):  # its target is listed anyway
            continue
        with suppress(OSError):
            weights = next((each.name for each in linked.iterdir() if each.name.endswith(READ)), None)
            if weights is not None:
                raise CheckpointError(
                    f"{label} holds weights, {shown(weights)}, in {shown(name)}, a link to another folder, which is not"
                    f" followed: put a copy in its place, or leave it out: {leave_out_option(name)}"
                )


def _check_complete(folder: Path, part: Part, label: str, leave_out: Sequence[str]) -> None:
    """Raise CheckpointError if a file that an index names is missing or named by --leave-out."""
    shard = next((name for name in part.files if matches(name, leave_out)), None)
    if shard is not None:
        raise CheckpointError(
            f"--leave-out names {shown(shard)} of {label}, a shard in {part.index or INDEX}; leave out no shard, or all"
            " of them and the index"
        )
    missing = [name for name in part.files if not (folder / name).exists()]
    if missing and (folder / missing[0]).is_symlink():
        raise CheckpointError(f"{label}: {shown(missing[0])} is a broken link; copy or download the model again")
    if missing:
        raise CheckpointError(
            f"{label} lacks {shown(missing[0])} ({len(missing)} of {len(part.files)} files), which its"
            f" {part.index or INDEX} names; copy or download it again"
        )


def _stamps_of(folder: Path, everything: list[str], copy_code: bool) -> dict[Path, Stamp]:
    """Return stamps of the small files, taken before they are read."""
    small = [
        name
        for name in everything
        if name in (RECIPE_FILE, ADAPTER_CONFIG) or ".index." in name or is_side_file(name, copy_code=copy_code)
    ]
    found = {}
    for path in (folder / name for name in small):
        with suppress(OSError):  # reported when the file is read
            found[path] = stamp(path)
    return found


def _parse_json_object(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises CheckpointError."""
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{shown(where)} is not JSON: {shown(error, 200)}; copy or download it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{shown(where)} is not a JSON object; copy or download it again")
    return parsed
