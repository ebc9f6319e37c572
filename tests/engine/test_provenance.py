"""--digests: the sha256 of every file, and the in-toto statement, as sigstore's model-signing 1.1 reads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from checkpoints import files_of, random_state, write_model
from mergekit_imm import OutputError, VerifyError, merge_checkpoints, verify
from merging_ranks import by_threads

SHAPES = {"model.embed_tokens.weight": (40, 16), "model.layers.0.w": (16, 16), "model.layers.1.w": (16, 16)}
STATEMENT = "imm_statement.json"


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, role in enumerate(("base", "sft")):
        side = {"tokenizer.json": "{}", "b/x.json": "{}", "b-c.json": "{}"}
        write_model(tmp_path / role, random_state(SHAPES, seed=seed), shards=[[*SHAPES][:1], [*SHAPES][1:]], side=side)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sums(folder: str) -> dict[str, str]:
    """The oracle: hashlib on every file there is."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files_of(Path(folder)).items()}


def stated(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / STATEMENT).read_text())
    return content


def test_the_digests_are_those_of_the_files(pair: Path) -> None:
    report = merge_checkpoints("base", "sft", "out", digests=True)
    there = sums("out")
    there.pop(STATEMENT)
    assert report.digests == there
    assert "b/x.json" in there
    assert merge_checkpoints("base", "sft", "plain").digests == {}
    plain = files_of(pair / "plain")
    assert {name: each for name, each in files_of(pair / "out").items() if name != STATEMENT} == plain


def test_the_statement(pair: Path) -> None:
    """What model-signing asks of a statement: resources sorted as paths, and their sum over the raw digests."""
    merge_checkpoints("base", "sft", "out", digests=True)
    content = stated("out")
    predicate = content["predicate"]
    names = [each["name"] for each in predicate["resources"]]
    assert names == sorted(names, key=PurePosixPath)
    assert names != sorted(names)  # b/x.json before b-c.json
    found = sums("out")
    assert {each["name"]: each["digest"] for each in predicate["resources"]} == {name: found[name] for name in names}
    whole = hashlib.sha256()
    for name in names:
        whole.update(bytes.fromhex(found[name]))
    assert content["subject"] == [{"name": ".", "digest": {"sha256": whole.hexdigest()}}]
    assert {each["algorithm"] for each in predicate["resources"]} == {"sha256"}
    assert STATEMENT in predicate["serialization"]["ignore_paths"]
    assert predicate["merge"] == json.loads((pair / "out" / "imm_recipe.json").read_text())


def test_the_same_merge_has_the_same_statement(pair: Path) -> None:
    merge_checkpoints("base", "sft", "one", digests=True, workers=1)
    merge_checkpoints("base", "sft", "other", digests=True, workers=3)
    by_threads(3, lambda ranks: merge_checkpoints("base", "sft", "ranks", digests=True, ranks=ranks))
    assert files_of(pair / "one") == files_of(pair / "other") == files_of(pair / "ranks")


def test_a_sweep_and_a_merge_that_is_there(pair: Path) -> None:
    merge_checkpoints("base", "sft", "out-0.3", alpha=0.3)
    reports = merge_checkpoints("base", "sft", "out-{alpha}", alpha=[0.3, 0.7], digests=True)
    assert [report.status for report in reports] == ["already merged", "merged"]
    for report in reports:
        there = sums(report.out)
        there.pop(STATEMENT)
        assert report.digests == there
    again = merge_checkpoints("base", "sft", "out-0.3", alpha=0.3, digests=True)
    assert again.digests == reports[0].digests


def test_a_statement_that_does_not_fit_is_not_renewed_in_silence(pair: Path) -> None:
    merge_checkpoints("base", "sft", "out", digests=True)
    before = (pair / "out" / STATEMENT).read_bytes()
    (pair / "out" / "tokenizer.json").write_text("[]")
    with pytest.raises(OutputError, match=r"statement of what out holds; `imm-verify out` tells"):
        merge_checkpoints("base", "sft", "out", digests=True)
    assert (pair / "out" / STATEMENT).read_bytes() == before
    with pytest.raises(VerifyError, match=r"tokenizer\.json differs"):
        verify("out")


@pytest.mark.parametrize("how", ["digest", "name", "json", "folder"])
def test_verify_reads_the_statement(pair: Path, how: str) -> None:
    merge_checkpoints("base", "sft", "out", digests=True)
    report = verify("out")
    assert STATEMENT in report.files_compared
    assert not report.not_of_the_merge
    path = pair / "out" / STATEMENT
    content = stated("out")
    resources = content["predicate"]["resources"]
    if how == "digest":
        resources[0]["digest"] = "0" * 64
    if how == "name":
        resources[0]["name"] = "other"
    path.write_text("{}" if how == "json" else json.dumps(content))
    if how == "folder":
        path.unlink()
        path.mkdir()
    words = {"digest": r"another digest of README\.md", "name": r"another digest of README\.md"}
    with pytest.raises(VerifyError, match=words.get(how, "is not the statement of a merge; remove it")):
        verify("out")


def test_statements_and_signatures_do_not_travel(pair: Path) -> None:
    """They speak of other bytes."""
    merge_checkpoints("base", "sft", "one", digests=True)
    (pair / "one" / "model.sig").write_text("{}")
    report = merge_checkpoints("base", "one", "two")
    assert not {STATEMENT, "model.sig"} & set(files_of(pair / "two"))
    assert {STATEMENT, "model.sig"} <= {*report.left_out["sft"]}


def test_a_dry_run_hashes_nothing(pair: Path) -> None:
    assert merge_checkpoints("base", "sft", "out", digests=True, dry_run=True).digests == {}
    assert not (pair / "out").exists()
