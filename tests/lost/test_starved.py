"""A merge without space, permission or file handles: a one-line error, nothing lost, a cure that works."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoints import files_of, random_state, write_model
from commands import CONFIG, SIDE, subprocess_of, write_pair
from mergekit_imm import CheckpointError, OutputError, merge_checkpoints
from mergekit_imm.output import journal
from refused import everything
from thorough import others

SIZE = 8  # MB of a model


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with base and sft of 8 MB each, in two files."""
    for seed, role in enumerate(("base", "sft")):
        state = random_state({f"layers.{i}.weight": (1 << 10, 1 << 9) for i in range(SIZE)}, seed=seed)
        shards = [list(state)[:4], list(state)[4:]]
        write_model(tmp_path / role, state, shards=shards, config=CONFIG, side=SIDE)
    return tmp_path


def inputs_of(folder: Path) -> dict[str, object]:
    return everything(folder / "base") | everything(folder / "sft")


NO_CHECK = """
from mergekit_imm import __main__
from mergekit_imm.output import direct_io, write_errors
write_errors.disk_of = lambda _: (1, 1 << 60)  # as if a quota applied, or another program took the free space
"""
NO_ALLOCATION = NO_CHECK + "direct_io.allocate = lambda descriptor, size: direct_io.os.ftruncate(descriptor, size)\n"
BEGIN = "__main__._begin('main')\n"


def test_a_disk_that_is_too_small_is_refused_before_a_byte(pair: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted(f"size={SIZE // 2}m")
    before = inputs_of(pair)
    ended = subprocess_of("merge", "base", "sft", "-o", place / "out", cwd=pair)
    assert ended.status == 1
    assert "needs 8.4 MB and the disk has 4.2 MB free; free some space or give an OUT on another disk" in ended.error
    assert list(place.iterdir()) == []
    assert inputs_of(pair) == before


@pytest.mark.parametrize("code", [*others(NO_CHECK), NO_ALLOCATION], ids=["when room is made", "while it is written"])
def test_a_disk_that_fills_up(pair: Path, mounted: Callable[[str], Path], code: str) -> None:
    """As the message says, the same command resumes once there is space."""
    place = mounted(f"size={SIZE // 2}m")
    before = inputs_of(pair)
    ended = subprocess_of("merge", "base", "sft", "-o", place / "out", cwd=pair, code=code + BEGIN)
    assert ended.status == 1
    assert "No space left on device; free some space; what was written is kept in" in ended.error
    assert "run the same command again" in ended.error
    assert not (place / "out").exists()
    assert (place / "out.partial").is_dir()
    assert inputs_of(pair) == before
    subprocess.run(["mount", "-o", f"remount,size={3 * SIZE}m", place], check=True)
    assert subprocess_of("merge", "base", "sft", "-o", place / "out", cwd=pair).status == 0
    assert subprocess_of("merge", "base", "sft", "-o", "out", cwd=pair).status == 0
    assert files_of(place / "out") == files_of(pair / "out")
    assert [path.name for path in place.iterdir()] == ["out"]


def test_an_output_on_another_filesystem(pair: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted(f"size={3 * SIZE}m")
    assert subprocess_of("merge", "base", "sft", "-o", place / "a" / "out", cwd=pair).status == 0
    assert (
        subprocess_of("merge", "base", "sft", "-o", place / "a" / "out", "--alpha", "0", "--overwrite", cwd=pair).status
        == 0
    )
    assert subprocess_of("merge", "base", "sft", "-o", "out", "--alpha", "0", cwd=pair).status == 0
    assert files_of(place / "a" / "out") == files_of(pair / "out")


def test_a_read_only_disk(pair: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted("size=100m")
    mounted("remount,ro")
    ended = subprocess_of("merge", "base", "sft", "-o", place / "new" / "out", cwd=pair)
    assert ended.status == 1
    assert "Read-only file system; choose another OUT" in ended.error
    assert "is kept" not in ended.error


def test_a_disk_that_becomes_read_only_while_it_is_written(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair)
    for call, number in ((write_fails(errno.EROFS, 3), errno.EROFS), (sync_fails(errno.EROFS), errno.EROFS)):
        with monkeypatch.context() as patch:
            call(patch)
            with pytest.raises(OutputError, match=os.strerror(number)):
                merge_checkpoints("base", "sft", "out")
    assert merge_checkpoints("base", "sft", "out").status == "merged"


def write_fails(number: int, nth: int) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        calls = [0]

        def failing(write: Callable[..., int]) -> Callable[..., int]:
            def counted(*arguments: object) -> int:
                calls[0] += 1
                if calls[0] >= nth:
                    raise OSError(number, os.strerror(number))
                return write(*arguments)

            return counted

        for name in ("pwrite", "pwritev"):
            patch.setattr(os, name, failing(getattr(os, name)))

    return apply


def sync_fails(number: int, name: str = "") -> Callable[[pytest.MonkeyPatch], None]:
    """Syncs of files with this name (any by default) fail."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        def failing(sync: Callable[[int], None]) -> Callable[[int], None]:
            def fail(descriptor: int) -> None:
                if Path(f"/proc/self/fd/{descriptor}").readlink().name.endswith(name):
                    raise OSError(number, os.strerror(number))
                sync(descriptor)

            return fail

        for call in ("fdatasync", "fsync"):
            patch.setattr(os, call, failing(getattr(os, call)))

    return apply


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.ENOSPC], ids=["EIO", "EDQUOT", "ENOSPC"])
@pytest.mark.parametrize("where", ["first write", "fifth write", "sync", "journal", "side file"])
def test_a_disk_that_fails(pair: Path, number: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair)
    monkeypatch.setattr("mergekit_imm.engine.stream.SYNC_BYTES", 1 << 20)
    before = inputs_of(pair)
    fails = {
        "first write": write_fails(number, 1),
        "fifth write": write_fails(number, 5),
        "sync": sync_fails(number, ".safetensors"),
        "journal": sync_fails(number, journal.JOURNAL),
        "side file": sync_fails(number, "tokenizer.json"),
    }[where]
    with monkeypatch.context() as patch:
        fails(patch)
        with pytest.raises(OutputError) as caught:
            merge_checkpoints("base", "sft", "out", workers=2)
    message = str(caught.value)
    assert message.isprintable()
    assert os.strerror(number) in message
    assert "kept in out.partial; run the same command again to resume" in message
    assert {errno.EIO: "check the disk", errno.EDQUOT: "raise the quota", errno.ENOSPC: "free some"}[number] in message
    assert not (pair / "out").exists()
    assert (pair / "out.partial").is_dir()
    assert inputs_of(pair) == before
    report = merge_checkpoints("base", "sft", "out")
    total = sum((pair / "out" / name).stat().st_size for name in report.files)
    assert report.bytes_written < total or where != "side file"  # recorded segments are not written again
    merge_checkpoints("base", "sft", "whole")
    assert files_of(pair / "out") == files_of(pair / "whole")


def test_an_input_that_cannot_be_read_any_more(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of an input fails: the message blames it, and what was merged is kept."""
    monkeypatch.chdir(pair)
    preadv, calls = os.preadv, [0]

    def failing(descriptor: int, buffers: list[memoryview], *rest: int) -> int:
        calls[0] += sum(map(len, buffers)) > 8192  # and not one of the sample that is looked at before
        if calls[0] == 8:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(CheckpointError, match=r"reading at byte \d+ failed: .*same command"):
            merge_checkpoints("base", "sft", "out")
    assert (pair / "out.partial").is_dir()
    assert merge_checkpoints("base", "sft", "out").status == "merged"


# --- permissions and limits

WITHOUT_PRIVILEGE = """
import ctypes, struct
from mergekit_imm import __main__
# Drop root's capabilities to override permissions (1: DAC_OVERRIDE, 2: DAC_READ_SEARCH).
libc = ctypes.CDLL(None, use_errno=True)
head = struct.pack('Ii', 0x20080522, 0)
data = ctypes.create_string_buffer(24)
libc.capget(head, data)
low, *rest = struct.unpack('6I', data.raw)
libc.capset(head, struct.pack('6I', low & ~0b110, *rest))
"""


@pytest.fixture
def forbidden() -> Iterator[Callable[[Path, int], None]]:
    """Change permissions until the test ends."""
    changed: list[tuple[Path, int]] = []

    def change(path: Path, mode: int) -> None:
        changed.append((path, path.stat().st_mode))
        path.chmod(mode)

    yield change
    for path, mode in reversed(changed):
        path.chmod(mode)


@pytest.mark.parametrize(
    ("place", "mode", "message"),
    [
        ("", 0o500, "Permission denied; choose another OUT or change its permissions"),
        ("sft/tokenizer.json", 0o000, "tokenizer.json cannot be read: Permission denied"),
        *others(
            ("", 0o000, "Permission denied; choose another OUT or change its permissions"),
            ("base/model-00001-of-00002.safetensors", 0o000, "base/model-00001-of-00002.safetensors"),
            ("sft/config.json", 0o000, "config.json cannot be read: Permission denied"),
            ("sft", 0o000, "sft sft cannot be"),
        ),
    ],
)
def test_no_permission(pair: Path, forbidden: Callable[[Path, int], None], place: str, mode: int, message: str) -> None:
    (pair / "outs").mkdir()
    forbidden(pair / (place or "outs"), mode)
    ended = subprocess_of("merge", "base", "sft", "-o", "outs/out", cwd=pair, code=WITHOUT_PRIVILEGE + BEGIN)
    assert ended.status == 1
    assert message in ended.error
    assert not (pair / "outs" / "out").exists()
    (pair / (place or "outs")).chmod(0o755)
    assert subprocess_of("merge", "base", "sft", "-o", "outs/out", cwd=pair).status == 0


FEW_FILES = """
import resource
from mergekit_imm import __main__
from mergekit_imm.engine import verify
from mergekit_imm.numerics import cpu
resource.setrlimit(resource.RLIMIT_NOFILE, (N_FILES, N_FILES))
"""


def test_too_few_open_files(tmp_path: Path) -> None:
    for seed, role in enumerate(("base", "sft")):
        state = random_state({f"layers.{i}.weight": (4, 4) for i in range(40)}, seed=seed)
        write_model(tmp_path / role, state, shards=[[name] for name in state], config=CONFIG)
    for limit, status in ((40, 1), (90, 1), (200, 0)):
        code = FEW_FILES.replace("N_FILES", str(limit)) + BEGIN
        ended = subprocess_of("merge", "base", "sft", "-o", "out", cwd=tmp_path, code=code)
        assert ended.status == status
        if status:
            assert "Too many open files; allow more open files (ulimit -n)" in ended.error
            assert not (tmp_path / "out").exists()


def test_files_that_may_not_be_as_large(pair: Path) -> None:
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n" + NO_CHECK + BEGIN
    ended = subprocess_of("merge", "base", "sft", "-o", "out", cwd=pair, code=code)
    assert ended.status == 1
    assert "File too large; the filesystem allows no file that large: use a smaller --max-shard-size" in ended.error
    assert subprocess_of("merge", "base", "sft", "-o", "out", cwd=pair).status == 0


@pytest.mark.parametrize("name", ["x" * 250, "x" * 300, f"{'d' * 200}/" * 25 + "out"], ids=["partial", "name", "path"])
def test_a_path_that_is_too_long(pair: Path, name: str) -> None:
    ended = subprocess_of("merge", "base", "sft", "-o", name, cwd=pair)
    assert ended.status == 1
    assert "File name too long; choose a shorter OUT; it is built as OUT.partial" in ended.error
    assert sorted(path.name for path in pair.iterdir()) == ["base", "sft"]


@pytest.mark.parametrize("mask", [*others(0o022, 0o077), 0o027])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    write_pair(tmp_path)
    (tmp_path / "sft" / "tokenizer.json").chmod(0o666)
    (tmp_path / "sft" / "templates").chmod(0o777)
    code = f"import os; os.umask({mask})\nfrom mergekit_imm import __main__\n" + BEGIN
    assert subprocess_of("merge", "base", "sft", "-o", "a/out", cwd=tmp_path, code=code).status == 0
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_the_same_model_twice_says_so(pair: Path) -> None:
    ended = subprocess_of("merge", "base", "./base", "-o", "out", "--json", cwd=pair)
    assert ended.status == 0
    assert ended.err == "note: BASE and SFT are the same model; the result is that model\n"
    assert json.loads(ended.out)["notes"] == [ended.err.strip()]
