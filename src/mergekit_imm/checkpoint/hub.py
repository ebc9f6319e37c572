"""Models on a Hugging Face hub: fetch what a merge needs at one commit, through the cache of huggingface_hub."""

from __future__ import annotations

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
from ..model.config import CONFIG
from ..options.recipe import RECIPE_FILE
from .model_files import (
    MAIN,
    Part,
    component,
    holds_parts,
    is_side_file,
    lacks_index,
    matches,
    parts_below,
    parts_beside,
    stem_of,
)
from .safetensors_file import ADAPTER, ADAPTER_CONFIG, HEADER_LIMIT, INDEX, MODEL

# Characters that the hub allows in names, and git in branches and tags.
_REF = re.compile(r"(\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?)(?:@([^\s~^:?*\[\\]+))?", re.ASCII)
_FIRST_READ = 100_000  # bytes; most headers fit


@dataclass(frozen=True)
class Snapshot:
    """A model in the cache, with every file that a merge needs."""

    repo: str
    commit: str
    folder: Path  # its files are links to blobs
    left_out: tuple[str, ...] = ()  # files that --leave-out names


@dataclass(frozen=True)
class Listing:
    """What a dry run reads of a model: no weights."""

    repo: str
    commit: str
    sizes: dict[str, int]  # of every file; offline, of those in the cache
    small: dict[str, bytes]  # contents of each config.json, the indexes and the recipe, where they exist
    headers: dict[str, bytes]  # JSON header of each safetensors file to read


@dataclass(frozen=True)
class _Repo:
    ref: str
    name: str
    revision: str | None  # as given
    commit: str
    sizes: dict[str, int]
    folder: Path | None  # the snapshot in the cache, if offline


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
    """Whether only the cache is used."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch(ref: str, *, copy_code: bool = False, leave_out: Sequence[str] = ()) -> Snapshot:
    """Return a snapshot in the cache with everything a merge needs of a hub id; download what is missing.

    With HF_HUB_OFFLINE, use the cache alone. Raises CheckpointError, one line that names the cure.
    """
    with _one_line(ref):
        # The client resolves the branch itself, so that its cache knows the branch offline. If the branch has moved
        # since we listed its files, list them again.
        for _ in range(2):
            snapshot, commit = _download(ref, copy_code, leave_out)
            if snapshot.commit == commit:
                return snapshot
        raise CheckpointError(
            f"{ref} is commit {commit[:8]} on the hub, and the client returned {snapshot.commit[:8]}; try again, or"
            f" give the commit: {snapshot.repo}@{commit}"
        )


def _download(ref: str, copy_code: bool, leave_out: Sequence[str]) -> tuple[Snapshot, str]:
    """Return the snapshot that the client downloaded, and the commit whose files were asked for."""
    from huggingface_hub import snapshot_download

    repo, left_out = _leave_out(_look_up(ref), leave_out)
    index = _parse_index(repo, _read_small(repo, INDEX))
    own, parts, adapters = _files_to_read(repo, index)
    if repo.folder is not None:
        return Snapshot(repo.name, repo.commit, repo.folder, left_out), repo.commit
    names = wanted(repo.sizes, [*own, *(name for part in parts for name in part.files)], copy_code)
    names += [part.index for part in parts if part.index]
    names += [name for name in repo.sizes if name.startswith(tuple(adapters)) and name not in names]
    patterns = [escape(name) for name in names]
    folder = Path(snapshot_download(repo.name, revision=repo.revision, allow_patterns=patterns))
    # The client returns part of a snapshot if the connection is lost at the wrong moment.
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and folder.name == repo.commit:
        raise EOFError(f"the download stopped before {missing[0]}")
    return Snapshot(repo.name, folder.name, folder, left_out), repo.commit


def list_remote(ref: str, leave_out: Sequence[str] = ()) -> Listing:
    """Read the headers of a hub id by range, and list its files with their sizes. Writes nothing.

    With HF_HUB_OFFLINE, read the cache alone. Raises CheckpointError, one line that names the cure.
    """
    with _one_line(ref), ThreadPoolExecutor(8) as pool:
        whole = _look_up(ref)
        repo, _ = _leave_out(whole, leave_out)
        small = _read_small(repo, CONFIG, INDEX, RECIPE_FILE, ADAPTER_CONFIG)
        own, parts, _ = _files_to_read(repo, _parse_index(repo, small))
        small |= _read_small(repo, *(part.index for part in parts if part.index))
        small |= _read_small(repo, *{f"{part.folder}{CONFIG}" for part in parts if part.folder})
        files = [*own, *(name for part in parts for name in part.files)]
        headers = pool.map(lambda name: _read_header(repo, name), files)
        return Listing(repo.name, repo.commit, whole.sizes, small, dict(zip(files, headers, strict=True)))


def wanted(names: Iterable[str], weights: Sequence[str], copy_code: bool) -> list[str]:
    """Return the files of a repository that a merge needs: its weights, index, recipe and side files.

    >>> wanted(["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"], False)
    ['model.safetensors', 'config.json']
    """
    own = (INDEX, RECIPE_FILE, ADAPTER_CONFIG)
    return [*weights, *(name for name in names if name in own or is_side_file(name, copy_code=copy_code))]


def _leave_out(repo: _Repo, leave_out: Sequence[str]) -> tuple[_Repo, tuple[str, ...]]:
    """Return the repository without the files that match `leave_out`, and the names of those."""
    left_out = tuple(name for name in repo.sizes if matches(name, leave_out))
    return replace(repo, sizes={name: size for name, size in repo.sizes.items() if name not in left_out}), left_out


def _files_to_read(repo: _Repo, index: dict[str, Any] | None) -> tuple[list[str], list[Part], list[str]]:
    """Return the model's own files, its parts beside and below them, and the sub-folders that hold an adapter."""
    top = [name for name in repo.sizes if "/" not in name]

    def read(path: str) -> dict[str, Any]:
        content = parse_json(_read_small(repo, path)[path])
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a JSON object")
        return content

    single = component(top, read)
    own = [] if single else _model_files(repo, index)
    below, adapters = parts_below(sorted(repo.sizes), read)
    parts = parts_beside(top, single.files if single else own) + below
    parts = [single, *parts] if single else parts
    other = next((name for part in parts for name in part.files if not name.endswith(".safetensors")), None)
    if other is not None:
        # Do not advise to leave out main weights: the model would not load.
        cure = "" if stem_of(other) in MAIN else f"; or leave the file out, --leave-out '{shown(other)}'"
        raise CheckpointError(
            f"{repo.ref} holds weights in {shown(other)}; on a hub only safetensors are read: download it,"
            f" `{_download_command(repo.name, repo.commit)} --local-dir DIR`, and give DIR"
            f"{cure}"
        )
    missing = [name for part in parts for name in part.files if name not in repo.sizes]
    if missing:
        raise CheckpointError(f"{repo.ref} lacks {shown(missing[0])}, which an index names; choose another revision")
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


def _model_files(repo: _Repo, index: dict[str, Any] | None) -> list[str]:
    """Return the model's own files. Raises CheckpointError if some are missing or it is not clear which they are."""
    if index is None and MODEL not in repo.sizes and holds_parts(repo.sizes):
        return []
    files = _weights(repo.sizes, index)
    whole = [name for name in files if name != ADAPTER]
    missing = [] if files == [MODEL] else sorted(_shards(index) - set(files))
    if repo.folder is not None and index is None:
        # Another tool may have cached a tokenizer without weights, or a shard without the index.
        partial = [MODEL] if not files else [INDEX] if re.search(r"-\d+-of-\d+\.", files[0]) else []
        missing = missing or partial
    where = f"{repo.ref} (commit {repo.commit[:8]})"
    if missing and repo.folder is not None:
        where, cure = f"{where} in the cache, {repo.folder},", _go_online(repo.name, repo.commit)
    elif missing:
        where, cure = f"{where} on the hub", f"its {INDEX} names it: choose another revision"
    if missing:
        raise CheckpointError(f"{where} lacks {shown(missing[0])} ({len(missing)} missing); {cure}")
    if index is None and not files:
        bins = [name for name in repo.sizes if re.fullmatch(r"(pytorch|adapter)_model[\w-]*\.bin", name)]
        if bins:
            raise CheckpointError(
                f"{where} holds no *.safetensors at its top, but {shown(bins[0])}; on a hub only safetensors are read:"
                f" download it, `{_download_command(repo.name, repo.commit)} --local-dir DIR`, and give DIR"
            )
        others = [name for name in repo.sizes if name.endswith((".bin", ".gguf", ".h5", ".pt", ".pth"))]
        raise CheckpointError(
            f"{where} holds no *.safetensors at its top{f', but {shown(others[0])}' if others else ''}; convert it"
            " (load with transformers, `save_pretrained`), or choose a revision that has been converted"
        )
    lacking = lacks_index(whole) if index is None else None
    if lacking is not None:
        raise CheckpointError(f"{where} {lacking}; choose another revision")
    if index is None and len(whole) > 1:
        raise CheckpointError(
            f"{where} holds neither {MODEL} nor {INDEX}, but {len(whole)} other safetensors files; download the"
            f" one to use, `{_download_command(repo.name, repo.commit, whole[0])}`, and give it by its path"
        )
    return files


def _look_up(ref: str) -> _Repo:
    """Resolve a hub id to a commit and its files, by one request to the hub, or offline in the cache."""
    parts = split_ref(ref)
    if parts is None:
        raise CheckpointError(f"{shown(ref)} is not a hub id; they have the form org/name[@revision]")
    with _one_line(ref, known=False):
        return _resolved(ref, *parts)


def _resolved(ref: str, repo: str, revision: str | None) -> _Repo:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
    except errors.OfflineModeIsEnabled:
        # With no pattern, the client returns the folder whatever files it holds.
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return _Repo(ref, repo, revision, folder.name, sizes, folder)
    sizes = {file.rfilename: file.size for file in info.siblings or () if file.size is not None}
    if info.sha is None or len(sizes) < len(info.siblings or ()):
        raise ValueError("its answer lacks the commit or the sizes of files")
    return _Repo(ref, repo, revision, info.sha, sizes, None)


def _read_small(repo: _Repo, *names: str) -> dict[str, bytes]:
    return {name: _read_start(repo, name, repo.sizes[name]) for name in names if name in repo.sizes}


def _parse_index(repo: _Repo, small: dict[str, bytes]) -> dict[str, Any] | None:
    if INDEX not in small:
        return None
    with suppress(ValueError):
        index = parse_json(small[INDEX])
        if isinstance(index, dict):
            return index
    raise CheckpointError(f"{repo.ref}: its {INDEX} is not a JSON object; choose another revision")


def _read_header(repo: _Repo, name: str) -> bytes:
    size = repo.sizes[name]
    head = _read_start(repo, name, min(size, _FIRST_READ))
    end = 8 + int.from_bytes(head[:8], "little")
    if end > min(size, 8 + HEADER_LIMIT):
        raise CheckpointError(f"{repo.ref}: {shown(name)} is not a whole safetensors file; choose another revision")
    return (head if end <= len(head) else _read_start(repo, name, end))[8:end]


def _read_start(repo: _Repo, name: str, count: int) -> bytes:
    """Return the first `count` bytes of a file, and transfer no more, even if the server ignores ranges.

    The client's own calls do less: its parser of headers refuses those over 25 MB, hides duplicate names and downloads
    the whole file if the server ignores ranges; so does its file system, with one more request for each file.
    """
    if repo.folder is not None:
        with (repo.folder / name).open("rb") as file:
            return file.read(count)
    if count == 0:
        return b""
    from huggingface_hub import constants, hf_hub_url, utils

    client: Any = utils
    url = hf_hub_url(repo.name, name, revision=repo.commit)
    # A range of a compressed response is not a range of the file.
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


def _download_command(repo: str, revision: str | None, *files: str) -> str:
    return shlex.join(["hf", "download", repo, *files, *(["--revision", revision] if revision else [])])


def _go_online(repo: str, revision: str | None) -> str:
    return f"unset HF_HUB_OFFLINE, or run `{_download_command(repo, revision)}` where there is a network"


@contextmanager
def _one_line(ref: str, *, known: bool = True) -> Iterator[None]:
    """Turn every error of the client, the HTTP library or a JSON parser into a CheckpointError of one line.

    Until it is `known` that the hub has it, `ref` may be a path that was mistyped.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{ref}{_reason(ref, error, known)}") from error


def _reason(ref: str, error: BaseException, known: bool) -> str:
    from huggingface_hub import constants, errors

    repo, revision = split_ref(ref) or (ref, None)
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if error.__cause__ is None:
            return (
                f": there is no such folder here, and as a hub id it is not in the cache, {constants.HF_HUB_CACHE};"
                f" check the path, or, for a hub id, {_go_online(repo, revision)}"
            )
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
    no_path = "" if known else "there is no such folder here, and as a hub id "
    return (
        f": {no_path}{hub} did not deliver it ({type(error).__name__}: {line}); check the"
        f" {'' if known else 'path, or the '}network and proxy and try again, or set HF_HUB_OFFLINE=1 to use what is"
        " cached"
    )
