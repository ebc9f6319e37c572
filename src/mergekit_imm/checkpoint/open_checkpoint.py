"""Open an input of a merge: a folder, a safetensors file or a hub id. Reads headers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from ..checkpoint import hub
from ..common.checks import as_path
from ..common.json_files import is_utf8
from ..common.messages import shown
from ..common.notes import Note, note
from ..errors import CheckpointError
from ..model.tensor_names import folder_of
from ..options.recipe import RECIPE_FILE, parse_recipe, read_recipe
from .assemble import assemble, in_part
from .checkpoint import Checkpoint
from .dcp import open_dcp
from .detect import BIN, BIN_INDEX, adapter_file, bin_files, dcp_prefix, model_files, no_model
from .folder import check_complete, check_links, parse_json_object, read_json_object, stamps_of, walk
from .hub import ADAPTER, ADAPTER_CONFIG
from .lazy_tensor import Tensor
from .parts import ADAPTERS, Part, component, leave_out_option, matches, parts_below, parts_beside
from .safetensors_file import INDEX, MODEL, TensorFile, open_tensorfile, parse_header
from .side_files import is_side_file
from .torch_file import open_torch_file


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
) -> Checkpoint:
    """Read the headers of a model: a local folder, a .safetensors file, or `org/name[@revision]`.

    An existing path wins over a hub id. A single file has tensors only, no config. Folders in `outs` and files or
    folders that match `leave_out` (paths in the model, or patterns) are not part of the model. Raises CheckpointError.
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
        return _from_folder(path, role, text, copy_code, outs, leave_out)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{role} {shown(text)} is not a .safetensors file; convert it: load it with transformers and"
                " `save_pretrained`"
            )
        file = open_tensorfile(path, path.name)
        return assemble(role, text, path.parent, {path.name: file}, None, {})
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

    def read(path: str) -> dict[str, Any]:
        return read_json_object(folder / path)

    try:
        listed = sorted(walk(folder, outs))
    except OSError as error:
        raise CheckpointError(f"{label} cannot be listed: {error.strerror}") from error
    invalid = next((name for name in listed if not is_utf8(name)), None)
    if invalid is not None:
        raise CheckpointError(f"{label} holds '{shown(invalid)}', a name that is not valid UTF-8; rename or remove it")
    everything = [name for name in listed if not matches(name, leave_out)]
    check_links(folder, everything, label)
    top = [name for name in everything if "/" not in name]
    stamps = stamps_of(folder, everything, copy_code)

    # Which files are the model, and which are its other parts.
    indexed_by = BIN_INDEX if bin_files(top) == [BIN_INDEX] else INDEX
    index = read(indexed_by) if indexed_by in top else None
    adapter = adapter_file(top) if role == "sft" else None
    prefix = None if adapter else dcp_prefix(everything)
    own = None if adapter or prefix is not None else component(top, read)
    if own is None:
        shown_ref = f"{ref} without what --leave-out names" if len(everything) < len(listed) else ref
        names = (
            [adapter] if adapter else [] if prefix is not None else model_files(top, index, role, shown_ref, everything)
        )
        own = Part(tuple(names), index=indexed_by if index is not None and MODEL not in names else None)
    names = [*own.files]
    beside, adapters = parts_below(everything, read)
    beside = parts_beside(top, names) + beside
    for part in (own, *beside):
        check_complete(folder, part, label, leave_out)

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
        if is_side_file(name, copy_code=copy_code) or (name.startswith(tuple(adapters)) and not name.endswith("/"))
    }
    unreadable = [name for name, path in side.items() if not path.is_file()]
    if unreadable:
        raise CheckpointError(
            f"{label}: {shown(unreadable[0])} is a broken link or not a plain file; repair or remove it"
        )

    indexes = {} if index is None or adapter else {indexed_by: index}
    indexes |= {path: read(path) for part in (own, *beside) if (path := part.index) and path not in indexes}
    config = read("config.json") if "config.json" in top else None
    parts = (own, *beside) if own.files else tuple(beside)
    found = assemble(
        role, ref, folder, files, config, side, parts=parts, files_beside=files_beside, indexes=indexes, tensors=tensors
    )
    configs = {f"{part.folder}config.json" for part in beside} & set(everything)
    adapter_config = read(ADAPTER_CONFIG) if adapter else None
    return replace(
        found,
        stamps=stamps,
        left_out=(*_left_out(listed, found), *others),
        adapter=adapter_config,
        trained_on=adapter_config.get("base_model_name_or_path") if adapter_config else None,
        adapters=tuple(adapters),
        part_configs={folder_of(path): read(path) for path in sorted(configs) if "/" in path},
        recipe=read_recipe(folder) if role == "start" else None,
        notes=(*found.notes, *_note_of_adapter(top, adapter, label)),
    )


def _from_listing(
    listing: hub.Listing, role: str, ref: str, copy_code: bool, leave_out: Sequence[str] = ()
) -> Checkpoint:
    everything = sorted(name for name in listing.sizes if not matches(name, leave_out))
    top = [name for name in everything if "/" not in name]
    small = {name: parse_json_object(content, f"{ref}/{name}") for name, content in listing.small.items()}
    index = small.get(INDEX)
    is_adapter = role == "sft" and adapter_file(top) == ADAPTER
    own = None if is_adapter else component(top, small.__getitem__)
    if own is None:
        names = [ADAPTER] if is_adapter else model_files(top, index, role, ref, everything)
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
        n: None for n in everything if is_side_file(n, copy_code=copy_code) or n.startswith(tuple(adapters))
    }
    indexes = {path: small[path] for part in (own, *beside) if (path := part.index)}
    if index is not None and not is_adapter:
        indexes[INDEX] = index
    main = {name: files.pop(name) for name in names}
    parts = (own, *beside) if own.files else tuple(beside)
    config = small.get("config.json")
    found = assemble(role, ref, None, main, config, side, parts=parts, files_beside=files, indexes=indexes)
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
    return in_part(open_tensorfile(path, name) if name.endswith(".safetensors") else open_torch_file(path, name))


def _opened_beside(path: Path, name: str, label: str) -> TensorFile:
    """Open a file beside a model's own, which may not be part of the model."""
    try:
        return _opened(path, name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; if it is not part of {label}, leave it out: {leave_out_option(name)}"
        ) from error


def _note_of_adapter(top: Sequence[str], adapter: str | None, label: str) -> list[Note]:
    found = next((name for name in ADAPTERS if name in top), None)
    if found is None or adapter is not None:
        return []
    text = "{label} holds an adapter beside its weights, {file}, which is not merged"
    return [note("adapter not merged", text, label=label, file=found)]


def _left_out(everything: list[str], found: Checkpoint) -> tuple[str, ...]:
    used = {*found.files, *found.side, *(part.index for part in found.parts)}
    used |= {INDEX} if MODEL in found.files else {BIN_INDEX} if BIN in found.files else set()
    return tuple(name for name in everything if name not in used)
