"""Models on a hub: from a cache alone, and from a hub on a loopback port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest

import mergekit_imm
from commands import HUNG
from fake_hub import FakeHub, Files, Repo, commit_of, fake_hub
from mergekit_imm.checkpoint.hub import split_ref, wanted

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

# huggingface_hub reads its environment on import, so each test makes its calls in a fresh process.
CALLS = """
import json, sys
from mergekit_imm.checkpoint import hub
from mergekit_imm.errors import CheckpointError
assert "huggingface_hub" not in sys.modules
for name, ref, options in json.loads(sys.argv[1]):
    try:
        found = vars(getattr(hub, name)(ref, **options))
    except CheckpointError as error:
        found = {"error": str(error)}
    print(json.dumps(found, default=lambda x: x.decode("latin-1") if isinstance(x, bytes) else str(x)))
assert "torch" not in sys.modules
"""
BOTH = ("fetch", "list_remote")


def calls(
    requests: list[tuple[str, str]], home: Path, *, hub: str = "", offline: bool = False, **options: object
) -> list[dict[str, Any]]:
    """Call functions of the module in one fresh process; return the fields of each result, or its error."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    source = str(Path(mergekit_imm.__file__).parents[1])
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [source, env.get("PYTHONPATH")]))}
    env |= {"HOME": str(home), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HF_ENDPOINT": hub or NOWHERE, "HF_HUB_OFFLINE": str(int(offline))}
    env |= {"HF_HUB_ETAG_TIMEOUT": str(HUNG), "HF_HUB_DOWNLOAD_TIMEOUT": str(HUNG)}  # a busy machine is not a failure
    given = json.dumps([(name, ref, options) for name, ref in requests])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CALLS, given], env=env, capture_output=True, text=True, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def call(name: str, ref: str, home: Path, *, hub: str = "", offline: bool = False, **options: object) -> dict[str, Any]:
    """Call one function of the module in a fresh process."""
    return calls([(name, ref)], home, hub=hub, offline=offline, **options)[0]


def refusals(refs: Iterable[str], home: Path, *, hub: str = "", offline: bool = False) -> list[tuple[str, str]]:
    """Call both functions with refs that they refuse; return each ref with its one-line error."""
    requests = [(name, ref) for ref in refs for name in BOTH]
    errors = [found.get("error", "") for found in calls(requests, home, hub=hub, offline=offline)]
    assert len(errors) == len(requests)
    for (_, ref), error in zip(requests, errors, strict=True):
        assert len(error.splitlines()) == 1
        assert error.startswith(ref)
    return [(ref, error) for (_, ref), error in zip(requests, errors, strict=True)]


def weights(count: int = 50_000, pad: int = 0) -> bytes:
    """A safetensors file of one tensor, with `pad` extra bytes of header."""
    entry = {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}
    header = json.dumps({"__metadata__": {"pad": "x" * pad}, "w": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(count)


def header_of(file: bytes) -> str:
    return file[8 : 8 + int.from_bytes(file[:8], "little")].decode()


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}).encode()


def sharded() -> Files:
    """A repository with a sharded model, its side files, and many unrelated files."""
    return {
        ".gitattributes": b"*",
        "README.md": b"# card",
        "LICENSE": b"free",
        "chat_template.jinja": b"{{ x }}",
        "config.json": b'{"model_type": "llama"}',
        "consolidated.safetensors": weights(7),
        "modeling_x.py": b"raise SystemExit",
        "model.fp16.safetensors": weights(8),
        ONE: weights(),
        TWO: weights(60_000),
        INDEX: index_of(ONE, TWO),
        "onnx/model.onnx": b"o" * 999,
        "optimizer.pt": b"o" * 999,
        "original/consolidated.00.pth": b"o" * 999,
        "processor/a [1].json": b"{}",
        "pytorch_model-00001-of-00001.bin": b"o" * 999,
        "tokenizer.json": b"{} ",
    }


def write_cache(home: Path, name: str, files: Files, *, revision: str = "main") -> Path:
    """Lay out a snapshot as huggingface_hub does: blobs, a note of the revision, relative links."""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = commit_of(name, files)
    note = repo / "refs" / revision
    note.parent.mkdir(parents=True)
    note.write_text(commit)
    (repo / "blobs").mkdir()
    for path, content in files.items():
        blob = repo / "blobs" / sha1(content).hexdigest()
        blob.write_bytes(content)
        link = repo / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repo / "snapshots" / commit


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


@pytest.mark.parametrize(
    ("ref", "parts"),
    [
        ("org/name", ("org/name", None)),
        ("Org-1/na.me_2", ("Org-1/na.me_2", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("org/name@feature@home", ("org/name", "feature@home")),
        ("name", None),
        ("a/b/c", None),
        ("./name", None),
        ("../name", None),
        ("org/..", None),
        ("/org/name", None),
        ("~/name", None),
        ("org/name/", None),
        ("org/na--me", None),
        ("org/name.git", None),
        ("-org/name", None),
        ("örg/name", None),
        ("org/name@", None),
        ("org/name@../x", None),
        ("org/name@/x", None),
        ("org/name@x/", None),
        ("org/name@a//b", None),
        ("org/name@a b", None),
        ("org/name@a\x1bb", None),
        ("org/name@a\u2028b", None),
        ("org/name\n", None),
        ("org\\name", None),
        ("", None),
    ],
)
def test_a_hub_id_is_told_by_its_form(ref: str, parts: tuple[str, str | None] | None) -> None:
    assert split_ref(ref) == parts


def test_only_what_a_merge_needs_is_wanted() -> None:
    files = sharded()
    side = ["LICENSE", "chat_template.jinja", "config.json"]
    rest = [INDEX, "processor/a [1].json", "tokenizer.json"]
    assert wanted(files, [ONE, TWO], False) == [ONE, TWO, *side, *rest]
    assert wanted(iter(files), [ONE, TWO], True) == [ONE, TWO, *side, "modeling_x.py", *rest]


# The cache alone.


def test_offline_a_cached_model_is_found(tmp_path: Path) -> None:
    files = sharded()
    folder = write_cache(tmp_path, "org/name", files)
    (folder / "gone.json").symlink_to("nowhere")
    tagged = write_cache(tmp_path, "org/tagged", {"model.safetensors": weights()}, revision="v1")
    requests = [("fetch", "org/name"), ("fetch", f"org/name@{folder.name}"), ("fetch", "org/tagged@v1")]
    *found, listing = calls([*requests, ("list_remote", "org/name")], tmp_path, offline=True)
    snapshot = {"repo": "org/name", "commit": folder.name, "folder": str(folder), "left_out": []}
    other = {"repo": "org/tagged", "commit": tagged.name, "folder": str(tagged), "left_out": []}
    assert found == [snapshot, snapshot, other]
    assert (folder / ONE).is_symlink()
    assert (listing["repo"], listing["commit"]) == ("org/name", folder.name)
    assert listing["sizes"] == {name: len(content) for name, content in files.items()}
    assert listing["small"] == {name: files[name].decode() for name in ("config.json", INDEX)}
    assert listing["headers"] == {name: header_of(files[name]) for name in (ONE, TWO)}


def test_offline_a_cached_model_that_lacks_files_is_refused(tmp_path: Path) -> None:
    others = ["consolidated.safetensors", "model.fp16.safetensors"]
    cases = {
        "org/shard": ([TWO], f"lacks {TWO} (1 missing)"),
        "org/shards": ([ONE, TWO], f"lacks {ONE} (2 missing)"),
        "org/index": ([ONE, INDEX, *others], f"lacks {INDEX} (1 missing)"),
        "org/tokenizer": ([ONE, TWO, INDEX, *others], "lacks model.safetensors (1 missing)"),
        "org/blob": ([], f"lacks {TWO} (1 missing)"),
    }
    folders = {}
    for name, (without, _) in cases.items():
        files = {file: content for file, content in sharded().items() if file not in without}
        folders[name] = write_cache(tmp_path, name, files)
    (folders["org/blob"] / TWO).resolve().unlink()
    for name, error in refusals(cases, tmp_path, offline=True):
        assert cases[name][1] in error
        assert f"`hf download {name} --revision {folders[name].name}`" in error


def test_offline_with_nothing_cached_is_one_line(tmp_path: Path) -> None:
    for _, error in refusals(["org/name@v2"], tmp_path, offline=True):
        assert error == (
            "org/name@v2: there is no such folder here, and as a hub id it is not in the cache,"
            f" {tmp_path / 'hub'}; check the path, or, for a hub id, unset HF_HUB_OFFLINE, or run"
            " `hf download org/name --revision v2` where there is a network"
        )
    assert list(tmp_path.iterdir()) == []
    write_cache(tmp_path, "org/name", {"model.safetensors": weights()}, revision="v1")
    for ref, error in refusals(["org/name", "not-an-id"], tmp_path, offline=True):
        assert ("`hf download org/name`" if ref == "org/name" else "org/name[@revision]") in error


# A hub.


def test_fetch_downloads_only_what_is_needed_and_only_once(tmp_path: Path, hub: FakeHub) -> None:
    files = sharded()
    commit = hub.add("org/name", files)
    found = call("fetch", "org/name", tmp_path, hub=hub.url)
    folder = Path(found["folder"])
    assert found == {"repo": "org/name", "commit": commit, "folder": str(folder), "left_out": []}
    assert folder.parts[-4:] == ("hub", "models--org--name", "snapshots", commit)
    needed = wanted(files, [ONE, TWO], False)
    assert hub.downloaded() == sorted(needed)
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        name: files[name] for name in needed
    }
    # Cached files are reused, and code is downloaded on request.
    hub.log.clear()
    assert call("fetch", "org/name", tmp_path, hub=hub.url, copy_code=True)["folder"] == str(folder)
    assert hub.downloaded() == [INDEX, "modeling_x.py"]
    # A later run resolves the branch without a network.
    assert call("fetch", "org/name", tmp_path, offline=True)["commit"] == commit


def test_one_model_file_and_an_adapter_are_fetched(tmp_path: Path, hub: FakeHub) -> None:
    hub.add("org/one", {"config.json": b"{}", "model.safetensors": weights(), INDEX: index_of(ONE), ONE: weights(3)})
    hub.add("org/lora", {"adapter_config.json": b"[]", "adapter_model.safetensors": weights()})
    hub.add("org/both", {"other.safetensors": weights(4), "adapter_model.safetensors": weights()})
    found = calls([("fetch", "org/one"), ("fetch", "org/lora"), ("fetch", "org/both")], tmp_path, hub=hub.url)
    assert all(Path(each["folder"]).is_dir() for each in found)
    one, lora = ["config.json", "model.safetensors", INDEX], ["adapter_config.json", "adapter_model.safetensors"]
    assert hub.downloaded() == [*lora, *one, "other.safetensors"]


def test_everything_comes_from_one_commit(tmp_path: Path, hub: FakeHub) -> None:
    """Even if the branch moves between the listing and the download."""
    old, new = {"model.safetensors": weights(10)}, {"model.safetensors": weights(20), "tokenizer.json": b"{}"}
    first, second = commit_of("org/name", old), commit_of("org/name", new)
    repo = Repo({first: old, second: new}, {"main": first, "v1": first}, moves_to=second)
    hub.repos["org/name"] = repo
    found = call("fetch", "org/name", tmp_path, hub=hub.url)
    assert repo.refs["main"] == second
    assert (found["commit"], Path(found["folder"]).name) == (second, second)
    assert {path.name: path.read_bytes() for path in Path(found["folder"]).iterdir()} == new
    assert all(f"/resolve/{second}/" in request.path for request in hub.log if "/resolve/" in request.path)
    assert call("fetch", "org/name", tmp_path, offline=True) == found
    pinned = call("fetch", f"org/name@{first}", tmp_path, hub=hub.url)
    assert pinned["commit"] == first
    assert (Path(pinned["folder"]) / "model.safetensors").read_bytes() == old["model.safetensors"]
    repo.refs["main"] = first
    refs = ["org/name", "org/name", "org/name@v1", f"org/name@{first}"]
    listings = calls([("list_remote", ref) for ref in refs], tmp_path, hub=hub.url)
    assert [listing["commit"] for listing in listings] == [first, second, first, first]
    for listing in listings:
        assert listing["headers"] == {
            "model.safetensors": header_of((old if listing["commit"] == first else new)["model.safetensors"])
        }


def test_list_remote_transfers_headers_and_small_files_alone(tmp_path: Path, hub: FakeHub) -> None:
    # The first header fits the first read; the second needs another.
    files = sharded() | {ONE: weights(2_000_000), TWO: weights(2_000_000, pad=150_000), "config.json": b""}
    commit = hub.add("org/name", files)
    listing = call("list_remote", "org/name", tmp_path, hub=hub.url)
    assert (listing["repo"], listing["commit"]) == ("org/name", commit)
    assert listing["sizes"] == {name: len(content) for name, content in files.items()}
    assert listing["small"] == {"config.json": "", INDEX: files[INDEX].decode()}
    assert listing["headers"] == {name: header_of(files[name]) for name in (ONE, TWO)}
    assert hub.downloaded() == [ONE, TWO, INDEX]
    assert hub.sent() <= 200_000 + 8 + len(header_of(files[TWO])) + len(files[INDEX])
    assert list(tmp_path.iterdir()) == []


def test_list_remote_reads_little_even_from_a_hub_without_ranges(tmp_path: Path, hub: FakeHub) -> None:
    files = {"config.json": b"{}", "model.safetensors": weights(40_000_000)}
    hub.add("org/name", files)
    hub.ranges = False
    listing = call("list_remote", "org/name", tmp_path, hub=hub.url)
    assert listing["small"] == {"config.json": "{}"}
    assert listing["headers"] == {"model.safetensors": header_of(files["model.safetensors"])}
    assert hub.sent() < 20_000_000  # as much as fits in connection buffers


def test_what_the_hub_refuses_is_one_line(tmp_path: Path, hub: FakeHub) -> None:
    hub.add("org/gated", sharded(), gated=True)
    hub.add("org/private", sharded(), private=True)
    for status in (401, 403, 429, 500):
        hub.add(f"org/api{status}", sharded())
        hub.status[f"^/api/models/org/api{status}"] = status
    hub.add("org/name", sharded())
    words = {
        "org/gated": ["is gated (403)", f"{hub.url}/org/gated", "`hf auth login`"],
        "org/private": ["no local path, and no model", "(401)", "`hf auth login`"],
        "org/nothing": ["no local path, and no model", "(401)", "`hf auth login`"],
        "org/name@v9": ["org/name has no such revision (404)", f"{hub.url}/org/name/commits/main"],
        f"org/name@{'0' * 40}": ["org/name has no such revision (404)"],
        "org/api401": ["refused the token (401); repeat `hf auth login`"],
        "org/api403": ["the token may not read it (403)", "/settings/tokens", "`hf auth login`"],
        "org/api429": ["answered 429; wait"],
        "org/api500": ["answered 500; wait"],
    }
    for ref, error in refusals(words, tmp_path, hub=hub.url):
        assert all(word in error for word in words[ref]), error


def test_a_file_that_is_refused_is_one_line_with_the_reason(tmp_path: Path, hub: FakeHub) -> None:
    # The client reports this as a file missing from the cache.
    hub.add("org/name", sharded())
    hub.status[f"/org/name/.*/{TWO}$"] = 403
    hub.add("org/short", sharded())
    hub.status[f"/org/short/.*/{TWO}$"] = 200  # with a body other than listed
    words = {"org/name": "the token may not read it (403)", "org/short": "did not deliver it ("}
    for ref, error in refusals(words, tmp_path, hub=hub.url):
        assert words[ref] in error
        assert "no such folder" not in error


def test_no_network_is_one_line(tmp_path: Path, hub: FakeHub) -> None:
    for _, error in refusals(["org/name"], tmp_path):
        start = f"org/name: there is no such folder here, and as a hub id {NOWHERE} did not deliver it (Conn"
        assert error.startswith(start)
        assert "check the path, or the network and proxy and try again, or set HF_HUB_OFFLINE=1" in error
    hub.page = b"<html>please log in</html>"
    for _, error in refusals(["org/name"], tmp_path, hub=hub.url):
        assert "did not deliver it (JSONDecodeError" in error


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, hub: FakeHub) -> None:
    hub.add("org/name", sharded())
    (tmp_path / "hub").write_text("a file in the way")
    error = call("fetch", "org/name", tmp_path, hub=hub.url)["error"]
    assert f"org/name: the cache, {tmp_path / 'hub'}, cannot be used" in error
    assert len(error.splitlines()) == 1


def test_a_download_that_stopped_is_not_taken_for_a_model(tmp_path: Path, hub: FakeHub) -> None:
    # The client silently falls back to a partly cached snapshot.
    files = sharded()
    hub.add("org/name", files)
    (write_cache(tmp_path, "org/name", files) / TWO).unlink()
    hub.status["/(tree|revision)/"] = 410
    error = call("fetch", "org/name", tmp_path, hub=hub.url)["error"]
    assert f"the download stopped before {TWO}" in error
    assert len(error.splitlines()) == 1


def test_an_older_commit_in_the_cache_is_not_taken_for_the_branch(tmp_path: Path, hub: FakeHub) -> None:
    # The client falls back on it if the hub fails to answer.
    write_cache(tmp_path, "org/name", {"model.safetensors": weights(10)})
    commit = hub.add("org/name", {"model.safetensors": weights(20)})
    hub.status["/revision/main$"] = 410
    error = call("fetch", "org/name", tmp_path, hub=hub.url)["error"]
    assert error.startswith(f"org/name is commit {commit[:8]} on the hub, and the client returned ")
    assert error.endswith(f"; try again, or give the commit: org/name@{commit}")
    assert call("fetch", f"org/name@{commit}", tmp_path, hub=hub.url)["commit"] == commit


def test_a_repository_that_is_no_model_is_refused_before_weights_are_downloaded(tmp_path: Path, hub: FakeHub) -> None:
    cases: dict[str, tuple[Files, str]] = {
        "org/shard": ({INDEX: index_of(ONE, TWO), ONE: b""}, f"lacks {TWO} (1 missing); its {INDEX} names it"),
        "org/list": ({INDEX: b"[]", ONE: b""}, f"its {INDEX} is not a JSON object"),
        "org/bytes": ({INDEX: b"\xff", ONE: b""}, f"its {INDEX} is not a JSON object"),
        "org/bin": ({"model.bin": b"", "sub/a.safetensors": b""}, "no *.safetensors at its top, but model.bin;"),
        "org/old": (
            {"pytorch_model-00001-of-00002.bin": b""},
            "but pytorch_model-00001-of-00002.bin; on a hub only safetensors are read: download it,"
            " `hf download org/old --revision ",
        ),
        "org/none": ({"config.json": b"{}"}, "no *.safetensors at its top;"),
        "org/shards": ({ONE: b"", TWO: b""}, f"lacks {INDEX}, which belongs to its 2 shards; choose another revision"),
        "org/one": ({ONE: b""}, f"lacks {INDEX}, which belongs to its 2 shards, and 1 of those; choose another"),
        "org/two": ({"a.safetensors": b"", "b.safetensors": b""}, "but 2 other safetensors files; download the one"),
    }
    for name, (files, _) in cases.items():
        hub.add(name, files)
    for name, error in refusals(cases, tmp_path, hub=hub.url):
        assert cases[name][1] in error
    assert hub.downloaded() == ["config.json", INDEX]


def test_list_remote_refuses_what_is_no_safetensors_file(tmp_path: Path, hub: FakeHub) -> None:
    cases = {
        "empty": b"",
        "short": b"1234567",
        "pointer": b"version https://git-lfs.github.com/spec/v1",
        "long": (109).to_bytes(8, "little") + bytes(100),
        "cut": weights()[:50],
    }
    for name, file in cases.items():
        hub.add(f"org/{name}", {"model.safetensors": file})
    for found in calls([("list_remote", f"org/{name}") for name in cases], tmp_path, hub=hub.url):
        assert "model.safetensors is not a whole safetensors file" in found["error"]
    # A header longer than safetensors permits, in a large enough file.
    with (write_cache(tmp_path, "org/huge", {"model.safetensors": b""}) / "model.safetensors").open("wb") as huge:
        huge.write((100_000_001).to_bytes(8, "little"))
        huge.truncate(100_000_009)
    error = call("list_remote", "org/huge", tmp_path, offline=True)["error"]
    assert "model.safetensors is not a whole safetensors file" in error
