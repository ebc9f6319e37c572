"""Inputs with damaged, incomplete or contradictory files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from checkpoints import random_state, write_model
from mergekit_imm import iter_merged
from mergekit_imm.engine.workers import run_segments
from mergekit_imm.errors import CheckpointError, MergeError, MismatchError
from refused import (
    INDEX,
    MODEL,
    NORM,
    SHAPES,
    UP0,
    Models,
    sharded,
    write_file,
    write_zeros,
)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..", "", 3, None, ["a"]]
)
def test_an_index_names_plain_file_names_only(models: Models, name: object) -> None:
    index = sharded(models)
    write_zeros(models.folder / "x.safetensors", {NORM: ("BF16", (8,))})
    index["weight_map"][NORM] = name
    (models.sft / INDEX).write_text(json.dumps(index))
    models.refused(CheckpointError, rf"{INDEX} names .*(only plain names of files beside it|not a safetensors file)")


def test_an_index_names_safetensors_files_only(models: Models) -> None:
    index = sharded(models)
    index["weight_map"][NORM] = "pytorch_model.bin"
    (models.sft / INDEX).write_text(json.dumps(index))
    models.refused(CheckpointError, rf"{INDEX} names .*pytorch_model\.bin.*not a safetensors file")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_weight_map_is_refused(models: Models, weight_map: object) -> None:
    index = sharded(models)
    index["weight_map"] = weight_map
    (models.sft / INDEX).write_text(json.dumps(index))
    models.refused(CheckpointError, rf"{INDEX} has no weight_map; download it again")


def test_a_missing_shard_is_named(models: Models) -> None:
    sharded(models)
    (models.sft / "model-00002-of-00002.safetensors").unlink()
    models.refused(CheckpointError, rf"sft .* lacks model-00002-of-00002\.safetensors \(1 of 2 files\).*{INDEX}.*again")


def test_a_tensor_that_its_shard_lacks_is_named(models: Models) -> None:
    index = sharded(models)
    index["weight_map"][NORM] = "model-00001-of-00002.safetensors"
    (models.sft / INDEX).write_text(json.dumps(index))
    models.refused(CheckpointError, rf"'{NORM}' is in model-00001-of-.* but it is in model-00002-of-.*again")
    index["weight_map"] |= {NORM: "model-00002-of-00002.safetensors", "ghost": "model-00001-of-00002.safetensors"}
    (models.sft / INDEX).write_text(json.dumps(index))
    models.refused(CheckpointError, r"'ghost' is in model-00001-of-.* but it is in none of its files.*again")


def test_a_tensor_that_the_index_does_not_name_is_refused(models: Models) -> None:
    index = sharded(models)
    del index["weight_map"][NORM]
    (models.sft / INDEX).write_text(json.dumps(index))
    models.refused(CheckpointError, rf"stores 1 tensors that its {INDEX} does not name, first '{NORM}'.*again")


def test_a_tensor_in_two_files_is_refused(models: Models) -> None:
    write_zeros(models.sft / "vit.safetensors", {UP0: ("BF16", (8, 8))})
    models.refused(
        CheckpointError,
        rf"stores tensor '{UP0}' twice, in model.safetensors and in vit.safetensors; leave one of the files out,"
        " --leave-out 'vit.safetensors', or remove it",
    )


def test_a_model_file_beside_an_index_of_other_tensors_is_refused(models: Models) -> None:
    sharded(models)
    write_zeros(models.sft / MODEL, {NORM: ("BF16", (8,))})
    models.refused(CheckpointError, rf"holds both {MODEL} and {INDEX}, with different tensors; delete the stale one")


def test_a_model_file_beside_an_index_of_the_same_tensors_is_read(models: Models) -> None:
    sharded(models)
    write_model(models.sft, random_state(SHAPES, seed=3))
    assert models.merge().status == "merged"


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
HEADERS = {
    "not JSON": b'{"a": ',
    "not text": b'{"\xff": {}}',
    "not an object": [1],
    "an entry that is no object": {"a": 1},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "an unknown dtype": {"a": {**GOOD["a"], "dtype": "F23"}},
    "a negative size": {"a": {**GOOD["a"], "shape": [-2]}},
    "a size that is no integer": {"a": {**GOOD["a"], "shape": [2.5]}},
    "a shape too large": {"a": {**GOOD["a"], "shape": [1 << 40, 1 << 40]}},
    "a shape that does not fill its bytes": {"a": {**GOOD["a"], "shape": [3]}},
    "bytes that end before they begin": {"a": {**GOOD["a"], "data_offsets": [8, 0]}},
    "tensors that overlap": {**GOOD, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "a hole before the first": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "a name twice, same bytes": b'{"a":%b,"a":%b}' % ((json.dumps(GOOD["a"]).encode(),) * 2),
    "a name twice, other bytes": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
    "a key twice in an entry": b'{"a":{"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "metadata that is no text": {**GOOD, "__metadata__": {"a": 1}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_malformed_headers_are_refused(models: Models, header: object) -> None:
    for file in (models.sft / MODEL, models.folder / "lone.safetensors"):
        write_file(file, header, bytes(8))
        match = rf"{file.name} (is not a whole safetensors file|has a malformed header)|{file.name}: .* is malformed"
        models.refused(CheckpointError, match, sft=file)


def test_a_hand_written_file_is_read_if_it_is_well_formed(models: Models) -> None:
    for role in ("base", "sft"):
        write_file(getattr(models, role) / MODEL, GOOD, bytes(8))
    assert models.merge().status == "merged"


@pytest.mark.parametrize("length", [9, 10_000, 100_000_001, 1 << 63])
def test_a_header_longer_than_its_file_is_refused(models: Models, length: int) -> None:
    write_file(models.sft / MODEL, b"{}", length=length)
    models.refused(CheckpointError, rf"{MODEL} is not a whole safetensors file.*copy or download it again")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_files_are_refused(models: Models, keep: int) -> None:
    content = (models.sft / MODEL).read_bytes()
    (models.sft / MODEL).write_bytes(content[:keep])
    models.refused(CheckpointError, rf"{MODEL} (is not a whole safetensors file|has \d+ bytes).*copy or download it")


def test_a_file_with_bytes_behind_its_last_tensor_is_refused(models: Models) -> None:
    with (models.sft / MODEL).open("ab") as file:
        file.write(b"\0")
    models.refused(CheckpointError, rf"{MODEL} (is not a whole safetensors file|has \d+ bytes).*copy or download it")


def test_names_from_files_are_escaped_and_cut(models: Models) -> None:
    models.change("sft", {"\x1b[2J\nerror: done": torch.zeros(2), "long" * 1000: torch.zeros(2)})
    assert len(models.refused(MismatchError, r"\\x1b\[2J\\nerror: done")) < 2000


@pytest.mark.parametrize(
    "damage", ["truncated", "duplicates", "a hole", "config", "index", "missing shard", "broken link", "importance"]
)
def test_messages_stay_one_line_whatever_the_folder_is_called(models: Models, damage: str) -> None:
    models.sft = models.sft.rename(models.folder / "two\nlines\x1b[2J")
    options: dict[str, Any] = {}
    match damage:
        case "truncated":
            (models.sft / MODEL).write_bytes(b"")
        case "duplicates":
            write_file(models.sft / MODEL, HEADERS["a name twice, same bytes"], bytes(8))
        case "a hole":
            write_file(models.sft / MODEL, HEADERS["a hole before the first"], bytes(8))
        case "config":
            (models.sft / "config.json").write_text("{")
        case "index":
            (models.sft / INDEX).write_text("{}")
        case "missing shard":
            (models.sft / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
            (models.sft / MODEL).unlink()
        case "broken link":
            (models.sft / "broken").symlink_to("gone")
        case "importance":
            options["importance"] = models.sft / "config.json"
            options["importance"].write_text("[]")
    models.refused(MergeError, r"two\\nlines", **options)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("content", [b"{", b"", b'"text"', b"[]", b'{"a": "\xff"}', b"{'a': 1}"])
def test_damaged_json_is_refused(models: Models, name: str, content: bytes) -> None:
    if name == INDEX:
        sharded(models)
    (models.sft / name).write_bytes(content)
    models.refused(CheckpointError, rf"sft/{name} is not (JSON|a JSON object).*copy or download it again")


@pytest.mark.parametrize("role", ["base", "sft"])
def test_a_broken_link_among_the_side_files_is_refused(models: Models, role: str) -> None:
    (getattr(models, role) / "vocab.json").symlink_to("../gone.json")
    models.refused(
        CheckpointError, rf"{role} .*: vocab\.json is a broken link or not a plain file; repair or remove it"
    )


def test_a_broken_link_to_the_model_is_refused_as_such(models: Models) -> None:
    (models.sft / MODEL).unlink()
    (models.sft / MODEL).symlink_to("../blobs/gone")
    assert "index" not in models.refused(CheckpointError, rf"sft .*{MODEL}.*(broken link|lacks|copy or download)")


def test_links_to_files_elsewhere_are_followed(models: Models) -> None:
    blobs = models.folder / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(models.sft.rglob("*.json"))):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    (models.sft / MODEL).rename(blobs / "weights")
    (models.sft / MODEL).symlink_to("../blobs/weights")
    assert models.merge().status == "merged"
    assert not any(path.is_symlink() for path in models.out.rglob("*"))


def test_a_file_that_vanishes_before_it_is_read_is_blamed_on_the_input(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(*arguments: Any, **options: Any) -> Any:
        (models.sft / MODEL).unlink()
        return run_segments(*arguments, **options)

    monkeypatch.setattr("mergekit_imm.engine.stream.run_segments", vanish)
    with pytest.raises(CheckpointError, match=r"sft/model\.safetensors cannot be read: No such file.*run the same"):
        models.merge()


def test_a_stream_refuses_a_dtype_torch_lacks_before_its_first_tensor(models: Models) -> None:
    for role in ("base", "sft"):
        write_zeros(getattr(models, role) / MODEL, {"a": ("BF16", [4]), "b": ("F4", [4])})
    with pytest.raises(CheckpointError, match=r"tensor 'b' is F4.*merge into a folder instead"):
        iter_merged(models.base, models.sft, keep=["^b$"])
