"""Models on a Hugging Face hub: what a merge needs of one, at a pinned commit, through huggingface_hub's cache."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from ..common.json_files import parse_json
from ..common.messages import shown
from ..errors import CheckpointError
from ..options.recipe import RECIPE_FILE
from .parts import (
    MAIN,
    Part,
    component,
    holds_parts,
    matches,
    parts_below,
    parts_beside,
    stem_of,
)
from .safetensors_file import HEADER_LIMIT, INDEX, MODEL
from .side_files import is_side_file

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

# What the hub allows in a name, and git in a branch or tag.
_REF = re.compile(r"(\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?)(?:@([^\s~^:?*\[\\]+))?", re.ASCII)
_FIRST_READ = 100_000  # holds nearly every header


@dataclass(frozen=True)
class Snapshot:
    """A model in the cache, complete as far as a merge needs it."""

    repo: str
    commit: str
    folder: Path  # its files are links to blobs
    left_out: tuple[str, ...] = ()  # files of the repository that were to be left out


@dataclass(frozen=True)
class Listing:
    """What a dry run needs of a model; no weights are downloaded for it."""

    repo: str
    commit: str
    sizes: dict[str, int]  # of every file (offline: of those in the cache)
    small: dict[str, bytes]  # content of each config.json, the indexes and the recipe, where they exist
    headers: dict[str, bytes]  # JSON headers of the model's files, without the length before them


@dataclass(frozen=True)
class _Found:
    ref: str
    repo: str
    revision: str | None  # as asked
    commit: str  # what it stands for
    sizes: dict[str, int]
    folder: Path | None  # offline: the snapshot in the cache


def split_ref(ref: str) -> tuple[str, str | None] | None:
    """Return ("org/name", revision or None) if ref has the form org/name[@revision], else None.

    >>> split_ref("org/name@v1"), split_ref("./name")
    (('org/name', 'v1'), None)
    """
    match = _REF.fullmatch(ref)
    if match is None or ".." in ref or "--" in match[1] or match[1].endswith(".git"):
        return None
    revision = match[2] or ""
    if "//" in revision or revision.strip("/") != revision or not revision.isprintable():
        return None
    return match[1], revision or None


def is_offline() -> bool:
    """Whether hub ids are looked up in the cache alone."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch(ref: str, *, copy_code: bool = False, leave_out: Sequence[str] = ()) -> Snapshot:
    """Download what a merge needs of a hub id, unless it is cached, and return where it lies.

    With HF_HUB_OFFLINE, from the cache alone. Raises CheckpointError, one line that names the cure.
    """
    from huggingface_hub import snapshot_download

    with _one_line(ref):
        found, left_out = _without(_find(ref), leave_out)
        index = _index(found, _small(found, INDEX))
        own, parts, adapters = _parts(found, index)
        if found.folder is not None:
            return Snapshot(found.repo, found.commit, found.folder, left_out)
        names = wanted(found.sizes, [*own, *(name for part in parts for name in part.files)], copy_code)
        names += [part.index for part in parts if part.index]
        names += [name for name in found.sizes if name.startswith(tuple(adapters)) and name not in names]
        patterns = [escape(name) for name in names]
        folder = Path(snapshot_download(found.repo, revision=found.commit, allow_patterns=patterns))
        # The client returns part of a snapshot if the connection is lost at the wrong moment.
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise EOFError(f"the download stopped before {missing[0]}")
        _remember(folder, found.revision or "main")
        return Snapshot(found.repo, found.commit, folder, left_out)


def list_remote(ref: str, leave_out: Sequence[str] = ()) -> Listing:
    """Return names, sizes and headers of a hub id's files, read by range; nothing is written.

    With HF_HUB_OFFLINE, of what is in the cache. Raises CheckpointError, one line that names the cure.
    """
    with _one_line(ref), ThreadPoolExecutor(8) as pool:
        whole = _find(ref)
        found, _ = _without(whole, leave_out)
        small = _small(found, "config.json", INDEX, RECIPE_FILE, ADAPTER_CONFIG)
        own, parts, _ = _parts(found, _index(found, small))
        small |= _small(found, *(part.index for part in parts if part.index))
        small |= _small(found, *{f"{part.folder}config.json" for part in parts if part.folder})
        files = [*own, *(name for part in parts for name in part.files)]
        headers = pool.map(lambda name: _header(found, name), files)
        return Listing(found.repo, found.commit, whole.sizes, small, dict(zip(files, headers, strict=True)))


def wanted(names: Iterable[str], weights: Sequence[str], copy_code: bool) -> list[str]:
    """Return which files of a repository a merge needs: its weights, its index, its recipe, side files.

    >>> wanted(["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"], False)
    ['model.safetensors', 'config.json']
    """
    own = (INDEX, RECIPE_FILE, ADAPTER_CONFIG)
    return [*weights, *(name for name in names if name in own or is_side_file(name, copy_code=copy_code))]


def _without(found: _Found, leave_out: Sequence[str]) -> tuple[_Found, tuple[str, ...]]:
    """Return a repository without the files that are to be left out, and their names."""
    left_out = tuple(name for name in found.sizes if matches(name, leave_out))
    return replace(found, sizes={name: size for name, size in found.sizes.items() if name not in left_out}), left_out


def _parts(found: _Found, index: dict[str, Any] | None) -> tuple[list[str], list[Part], list[str]]:
    """Return the model's own files, the parts beside and below them, and the sub-folders that hold an adapter."""
    top = [name for name in found.sizes if "/" not in name]

    def read(path: str) -> dict[str, Any]:
        content = parse_json(_small(found, path)[path])
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no JSON object")
        return content

    alone = component(top, read)
    own = [] if alone else _model_files(found, index)
    below, adapters = parts_below(sorted(found.sizes), read)
    parts = parts_beside(top, alone.files if alone else own) + below
    parts = [alone, *parts] if alone else parts
    other = next((name for part in parts for name in part.files if not name.endswith(".safetensors")), None)
    if other is not None:
        # Without its main weights a model does not load.
        cure = "" if stem_of(other) in MAIN else f"; or leave the file out, --leave-out '{shown(other)}'"
        raise CheckpointError(
            f"{found.ref} holds weights in {shown(other)}; on a hub only safetensors are read: download it,"
            f" `{_command(found.repo, found.commit)} --local-dir DIR`, and give DIR"
            f"{cure}"
        )
    lacking = [name for part in parts for name in part.files if name not in found.sizes]
    if lacking:
        raise CheckpointError(f"{found.ref} lacks {shown(lacking[0])}, which an index names; choose another revision")
    return own, parts, adapters


def _weights(names: Iterable[str], index: dict[str, Any] | None) -> list[str]:
    top = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if MODEL in top:
        return [MODEL]
    shards = _shards(index)
    return top if index is None else [name for name in top if name in shards]


def _shards(index: dict[str, Any] | None) -> set[str]:
    weight_map = (index or {}).get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    return {value for value in values if isinstance(value, str)}


def _model_files(found: _Found, index: dict[str, Any] | None) -> list[str]:
    """Return the model's files; raise CheckpointError where some are missing, or which they are is not clear."""
    if index is None and MODEL not in found.sizes and holds_parts(found.sizes):
        return []
    files = _weights(found.sizes, index)
    whole = [name for name in files if name != ADAPTER]
    lacking = [] if files == [MODEL] else sorted(_shards(index) - set(files))
    if found.folder is not None and index is None:
        # Other tools cache parts of a model: a tokenizer without weights, a shard without the index.
        partial = [MODEL] if not files else [INDEX] if re.search(r"-\d+-of-\d+\.", files[0]) else []
        lacking = lacking or partial
    where = f"{found.ref} (commit {found.commit[:8]})"
    if lacking and found.folder is not None:
        where, cure = f"{where} in the cache, {found.folder},", _online(found.repo, found.commit)
    elif lacking:
        where, cure = f"{where} on the hub", f"its {INDEX} names it: choose another revision"
    if lacking:
        raise CheckpointError(f"{where} lacks {shown(lacking[0])} ({len(lacking)} missing); {cure}")
    if index is None and not files:
        bins = [name for name in found.sizes if re.fullmatch(r"(pytorch|adapter)_model[\w-]*\.bin", name)]
        if bins:
            raise CheckpointError(
                f"{where} holds no *.safetensors at its top, but {shown(bins[0])}; on a hub only safetensors are read:"
                f" download it, `{_command(found.repo, found.commit)} --local-dir DIR`, and give DIR"
            )
        others = [name for name in found.sizes if name.endswith((".bin", ".gguf", ".h5", ".pt", ".pth"))]
        raise CheckpointError(
            f"{where} holds no *.safetensors at its top{f', but {shown(others[0])}' if others else ''}; convert it"
            " (load with transformers, `save_pretrained`), or choose a revision that has been converted"
        )
    if index is None and len(whole) > 1:
        raise CheckpointError(
            f"{where} holds neither {MODEL} nor {INDEX}, but {len(whole)} other safetensors files; download the"
            f" one to use, `{_command(found.repo, found.commit, whole[0])}`, and give it by its path"
        )
    return files


def _find(ref: str) -> _Found:
    """Resolve a hub id to a commit and its files: by one question to the hub, or offline in the cache."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    parts = split_ref(ref)
    if parts is None:
        raise CheckpointError(f"{shown(ref)} is not a hub id; they have the form org/name[@revision]")
    repo, revision = parts
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
    except errors.OfflineModeIsEnabled:
        # No pattern: the folder alone, whatever it holds.
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return _Found(ref, repo, revision, folder.name, sizes, folder)
    sizes = {file.rfilename: file.size for file in info.siblings or () if file.size is not None}
    if info.sha is None or len(sizes) < len(info.siblings or ()):
        raise ValueError("its answer lacks the commit or the sizes of files")
    return _Found(ref, repo, revision, info.sha, sizes, None)


def _small(found: _Found, *names: str) -> dict[str, bytes]:
    return {name: _head(found, name, found.sizes[name]) for name in names if name in found.sizes}


def _index(found: _Found, small: dict[str, bytes]) -> dict[str, Any] | None:
    if INDEX not in small:
        return None
    with suppress(ValueError):
        index = parse_json(small[INDEX])
        if isinstance(index, dict):
            return index
    raise CheckpointError(f"{found.ref}: its {INDEX} is not a JSON object; choose another revision")


def _header(found: _Found, name: str) -> bytes:
    size = found.sizes[name]
    head = _head(found, name, min(size, _FIRST_READ))
    end = 8 + int.from_bytes(head[:8], "little")
    if end > min(size, 8 + HEADER_LIMIT):
        raise CheckpointError(f"{found.ref}: {shown(name)} is not a whole safetensors file; choose another revision")
    return (head if end <= len(head) else _head(found, name, end))[8:end]


def _head(found: _Found, name: str, count: int) -> bytes:
    """Return the first bytes of a file; transfer no more, even from a server that knows no ranges."""
    if found.folder is not None:
        with (found.folder / name).open("rb") as file:
            return file.read(count)
    if count == 0:
        return b""
    from huggingface_hub import constants, hf_hub_url, utils

    client: Any = utils
    url = hf_hub_url(found.repo, name, revision=found.commit)
    # Compressed, ranges would not be of the file.
    headers = {**client.build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    options = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "max_retries": 2}
    if hasattr(client, "http_stream_backoff"):
        answer = client.http_stream_backoff("GET", url, **options)
    else:  # before huggingface_hub 1
        answer = client.http_backoff("GET", url, stream=True, **options)
    content = bytearray()
    with answer as response:
        client.hf_raise_for_status(response)
        chunks = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(1 << 16)
        while len(content) < count and (chunk := next(chunks, b"")):
            content += chunk
    if len(content) < count:
        raise EOFError(f"{name} ended after {len(content)} of {count} bytes")
    return bytes(content[:count])


def _remember(folder: Path, revision: str) -> None:
    """Note which commit a branch or tag stands for, as the cache does, so that it is found offline."""
    note = folder.parents[1] / "refs" / revision
    with suppress(OSError):  # a cache that is shared and read-only
        if revision != folder.name and not (note.is_file() and note.read_text() == folder.name):
            note.parent.mkdir(parents=True, exist_ok=True)
            draft = note.with_name(f".{note.name}.{os.getpid()}")
            draft.write_text(folder.name)
            draft.replace(note)


def _command(repo: str, revision: str | None, *files: str) -> str:
    return shlex.join(["hf", "download", repo, *files, *(["--revision", revision] if revision else [])])


def _online(repo: str, revision: str | None) -> str:
    return f"HF_HUB_OFFLINE is set: unset it, or run `{_command(repo, revision)}` where there is a network"


@contextmanager
def _one_line(ref: str) -> Iterator[None]:
    """Turn whatever the client raises (its own errors, those of the HTTP library, of JSON) into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{ref}{_reason(ref, error)}") from error


def _reason(ref: str, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    repo, revision = split_ref(ref) or (ref, None)
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if error.__cause__ is None:
            return f" is not in the cache, {constants.HF_HUB_CACHE}; {_online(repo, revision)}"
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "`hf auth login` (or set HF_TOKEN)"
    if isinstance(error, errors.GatedRepoError):
        return f" is gated ({status}); ask for access on {page}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f" is no local path, and no model that {hub} shows you ({status}); correct it, or if private: {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f": {repo} has no such revision ({status}); see {page}/commits/main for those it has"
    if status == 401:
        return f": {hub} refused the token (401); repeat {login}"
    if status == 403:
        return f": the token may not read it (403); permit that on {hub}/settings/tokens, or use another: {login}"
    if status is not None:
        return f": {hub} answered {status}; wait a few minutes and try again"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, (ConnectionError, TimeoutError)):
        cache = constants.HF_HUB_CACHE
        return f": the cache, {cache}, cannot be used: {error.strerror}; make room there, or set HF_HOME elsewhere"
    line = shown(next(iter(str(error).strip().splitlines()), ""), 200)
    return (
        f": {hub} did not deliver it ({type(error).__name__}: {line}); check the network and proxy and try again,"
        " or set HF_HUB_OFFLINE=1 to use what is cached"
    )
