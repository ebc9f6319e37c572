"""What a merge refuses: every error is one line with what was found, where, and the cure; and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import files_of, random_state, read_model, same_bits, write_model
from mergekit_imm import MergeReport, dare_merge, iter_merged, merge_checkpoints
from mergekit_imm.checkpoint import output
from mergekit_imm.checkpoint.tensorfile import DTYPE_BITS
from mergekit_imm.errors import (
    ArgumentError,
    CheckpointError,
    MergeError,
    MismatchError,
    NonFiniteError,
    OutputError,
)

UP0, UP1 = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
NORM, HEAD, STEPS = "model.norm.weight", "lm_head.weight", "model.steps"
SHAPES = {"model.embed_tokens.weight": (32, 8), UP0: (8, 8), UP1: (8, 8), NORM: (8,), HEAD: (32, 8)}
CONFIG = {
    "architectures": ["TinyForCausalLM"], "dtype": "bfloat16", "model_type": "tiny", "tie_word_embeddings": False,
    "vocab_size": 32,
}  # fmt: skip
SIDE = {"tokenizer.json": '{"a": 1}\n', "templates/chat.jinja": "{{ x }}"}
MODEL, INDEX, PARTIAL = "model.safetensors", "model.safetensors.index.json", "out.partial"


def everything(folder: Path, *, times: bool = True) -> dict[str, object]:
    """All that lies below a folder: contents, links, and when it was last changed."""
    found: dict[str, object] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path)] = (content, path.lstat().st_mtime_ns if times else 0)
    return found


@dataclass
class Models:
    """Two small models that merge, and a place for the result."""

    folder: Path
    base: Path
    sft: Path
    out: Path

    def merge(self, **options: Any) -> MergeReport:
        places = {role: options.pop(role, getattr(self, role)) for role in ("base", "sft", "out")}
        return merge_checkpoints(*places.values(), **{"workers": 1, **options})

    def refused(self, error: type[MergeError], match: str, *, streaming: bool = False, **options: Any) -> str:
        """Check that a merge is refused, and that nothing changes; return the message.

        Unless it takes `streaming` to notice, a dry run refuses it with the same words.
        """
        before = everything(self.folder, times=not streaming)
        messages = set()
        for dry_run in [False] if streaming else [True, False]:
            with pytest.raises(error, match=match) as caught:
                self.merge(dry_run=dry_run, **options)
            assert error in (type(caught.value), MergeError)
            assert everything(self.folder, times=not streaming) == before
            messages.add(str(caught.value))
        assert len(messages) == 1
        assert all(message.isprintable() for message in messages)
        return messages.pop()

    def change(self, role: str, changes: Mapping[str, torch.Tensor | None], config: Mapping[str, Any] = CONFIG) -> None:
        """Write a role's model again with other tensors; None removes one."""
        state = {**random_state(SHAPES, seed=len(role)), **changes}
        write_model(getattr(self, role), {n: t for n, t in state.items() if t is not None}, config=config)

    def merged(self) -> dict[str, torch.Tensor]:
        return read_model(self.out)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None, raising=False)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    made = Models(tmp_path, tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    for role in ("base", "sft"):
        write_model(getattr(made, role), random_state(SHAPES, seed=len(role)), config=CONFIG, side=SIDE)
    return made


def write_file(path: Path, header: object, data: bytes | None = None, *, length: int | None = None) -> Path:
    """Write a safetensors file from its header: bytes, or what is turned into JSON."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = b"" if data is None else data
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + body)
    return path


def write_zeros(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> Path:
    """Write a safetensors file of zeros: name -> dtype as the header says it, shape."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return write_file(path, header, bytes(end))


def shown_options(message: str) -> list[dict[str, list[str]]]:
    """The options that a message shows ready to paste, as a shell takes them."""
    found: list[dict[str, list[str]]] = []
    for match in re.finditer(r"""--(keep|take) (?=['"^])""", message):
        lexer = shlex.shlex(message[match.end() :], posix=True)
        lexer.whitespace_split = True
        lexer.commenters = ""
        found.append({match[1]: [next(lexer).rstrip(";,")]})
    return found


# --- names


def test_a_tensor_that_only_base_has_is_refused_with_the_closest_name(models: Models) -> None:
    models.change("sft", {UP1: None, "model.layers.1.mlp.up_prj.weight": torch.zeros(8, 8)})
    match = rf"base \S+base only, not in sft \S+sft: '{re.escape(UP1)}' .*up_prj\.weight'.*--keep"
    models.refused(MismatchError, match)


def test_a_tensor_that_only_sft_has_is_refused_with_the_closest_name(models: Models) -> None:
    models.change("sft", {"model.layers.1.mlp.up_prj.weight": torch.zeros(8, 8)})
    match = rf"sft \S+sft only, not in base \S+base: 'model.*up_prj\.weight' .*{re.escape(UP1)}.*--take"
    models.refused(MismatchError, match)


NAMES = [
    "score.weight", "a.w(1)[2]+*?^$|{3}.weight", "it's", 'a "b"', "C:\\weights", "two words", "gewicht.ü.权重",
    "line\nbreak", "\x1b[2Jescape", "-dash", "long." * 24 + "weight",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("role", "option"), [("base", "keep"), ("sft", "take")])
def test_the_option_that_a_refused_name_comes_with_works_as_it_is_shown(
    models: Models, name: str, role: str, option: str
) -> None:
    extra = torch.arange(4, dtype=torch.bfloat16)
    models.change(role, {name: extra})
    shown = shown_options(models.refused(MismatchError, f"only.*--{option}"))
    assert [list(each) for each in shown] == [[option]]
    report = models.merge(**shown[0])
    assert report.tensors[{"keep": "kept", "take": "taken"}[option]] == 1
    assert same_bits(models.merged()[name], extra)


def test_options_shown_for_many_names_let_through_no_other_tensor(models: Models) -> None:
    models.change("base", {f"extra.{i}": torch.zeros(4) for i in range(7)})
    keep: list[str] = []
    for _ in range(7):
        shown = shown_options(models.refused(MismatchError, r"(\d+) tensors are in base", keep=keep))
        keep += shown[0]["keep"]
        if all(any(re.search(pattern, f"extra.{i}") for pattern in keep) for i in range(7)):
            break
    report = models.merge(keep=keep)
    assert (report.tensors["kept"], report.tensors["merged"]) == (7, len(SHAPES))


def test_a_tensor_that_start_lacks_or_has_alone_is_refused(models: Models) -> None:
    start = write_model(models.folder / "start", random_state({k: v for k, v in SHAPES.items() if k != NORM}))
    models.refused(MismatchError, rf"{NORM}.*--keep", start=start, iteration=1)
    write_model(start, random_state({**SHAPES, "extra": (2,)}))
    models.refused(MismatchError, r"start \S+start only, not in base .*'extra'", start=start, iteration=1)


# --- shapes and dtypes


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((4, 8), rf"{re.escape(UP0)}.*BF16 \[8, 8\].*base.*BF16 \[4, 8\].*sft.*shapes must be equal.*--keep"),
        ((64,), r"BF16 \[8, 8\].*BF16 \[64\].*--keep"),
        ((8, 8, 1), r"BF16 \[8, 8\].*BF16 \[8, 8, 1\].*--keep"),
        ((0,), r"BF16 \[8, 8\].*BF16 \[0\].*empty.*ZeRO-3.*save"),
    ],
)
def test_different_shapes_are_refused(models: Models, shape: tuple[int, ...], match: str) -> None:
    models.change("sft", {UP0: torch.zeros(shape, dtype=torch.bfloat16)})
    models.refused(MismatchError, match)
    report = models.merge(keep=[f"^{re.escape(UP0)}$"])
    assert report.tensors["kept"] == 1


def test_an_empty_tensor_of_the_base_against_a_full_one_is_refused(models: Models) -> None:
    models.change("base", {UP0: torch.zeros(0, dtype=torch.bfloat16)})
    models.refused(MismatchError, r"BF16 \[0\].*base.*BF16 \[8, 8\].*ZeRO-3")


def test_tensors_that_are_empty_in_all_inputs_are_no_error(models: Models) -> None:
    for role in ("base", "sft"):
        models.change(role, {UP0: torch.zeros(0, 8, dtype=torch.bfloat16)})
    assert models.merge().status == "merged"
    assert models.merged()[UP0].shape == (0, 8)


def test_different_vocabularies_are_refused_as_such(models: Models) -> None:
    models.change("sft", {HEAD: torch.zeros(40, 8, dtype=torch.bfloat16)})
    models.refused(MismatchError, rf"{HEAD}.*\[32, 8\].*\[40, 8\].*vocabular.*resize")


@pytest.mark.parametrize(
    ("one", "other"),
    [("I64", "BF16"), ("BF16", "I64"), ("I64", "I32"), ("U8", "BOOL"), ("I8", "U8"), ("F32", "BOOL")],
)
def test_kinds_of_dtype_that_differ_are_refused_and_the_option_shown_works(
    models: Models, one: str, other: str
) -> None:
    for role, dtype in (("base", one), ("sft", other)):
        write_zeros(getattr(models, role) / MODEL, {STEPS: (dtype, (3,)), NORM: ("BF16", (8,))})
    message = models.refused(
        MismatchError, rf"'{STEPS}' is {one} \[3\] in base .* and {other} \[3\] in sft .*integers.*--keep"
    )  # fmt: skip
    assert models.merge(**shown_options(message)[0]).tensors["kept"] == 1


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64"])
@pytest.mark.parametrize("role", ["base", "sft"])
def test_quantised_and_complex_tensors_are_refused_unless_kept_or_taken(models: Models, role: str, dtype: str) -> None:
    write_zeros(models.base / MODEL, {UP0: ("BF16", (4,)), NORM: ("BF16", (8,))})
    write_zeros(models.sft / MODEL, {UP0: ("BF16", (4,)), NORM: ("BF16", (8,))})
    write_zeros(getattr(models, role) / MODEL, {UP0: (dtype, (4,)), NORM: ("BF16", (8,))})
    match = rf"{re.escape(UP0)}' is {dtype} in {role} .*not merged.*unquantised.*--keep.*--take"
    message = models.refused(CheckpointError, match)
    for number, option in enumerate(shown_options(message)):
        assert models.merge(out=models.folder / f"out{number}", **option).tensors["merged"] == 1


@pytest.mark.parametrize("role", ["base", "sft"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_models_are_refused(models: Models, role: str, key: str) -> None:
    models.change(role, {}, {**CONFIG, key: {"quant_method": "awq"}})
    models.refused(CheckpointError, f"{role} .*is quantised.*config.json has a {key} of awq.*merge the unquantised")


@pytest.mark.parametrize("key", ["model_type", "architectures"])
@pytest.mark.parametrize("other", ["other", None])
def test_different_architectures_are_refused(models: Models, key: str, other: str | None) -> None:
    models.change("sft", {}, {**CONFIG, key: other})
    models.refused(MismatchError, rf"base .* has {key} .*[tT]iny.*sft .* has {other or 'none'}.*one architecture")


def test_the_architecture_of_start_counts_too(models: Models) -> None:
    start = write_model(models.folder / "start", random_state(SHAPES), config={**CONFIG, "model_type": "other"})
    models.refused(MismatchError, "start .* has other", start=start, iteration=1)


# --- folders and files


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, r"sft \S+ holds no \*\.safetensors file; is it a model folder\?"),
        ({"pytorch_model.bin": "x"}, r"PyTorch pickles; it is not read: .*save_pretrained"),
        ({"consolidated.00.pth": "x"}, r"PyTorch pickles.*save_pretrained"),
        ({"model-q4.gguf": "x"}, r"GGUF.*use the original safetensors checkpoint"),
        ({"tf_model.h5": "x"}, r"TensorFlow, Flax or ONNX.*use the safetensors"),
        ({"flax_model.msgpack": "x"}, r"TensorFlow, Flax or ONNX"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": "x"}, r"a LoRA adapter.*merge_and_unload"),
        ({"adapter_config.json": "{}", "adapter_model.bin": "x"}, r"a LoRA adapter.*merge_and_unload"),
        ({".metadata": "x", "__0_0.distcp": "x"}, r"torch\.distributed checkpoint.*dcp_to_torch"),
        ({"latest": "global_step5", "zero_to_fp32.py": "x"}, r"DeepSpeed.*zero_to_fp32\.py"),
        ({"one.safetensors": "x", "two.safetensors": "x"}, r"2 other.*one\.safetensors, two\.safetensors.*its path"),
    ],
)  # fmt: skip
def test_folders_without_a_model_are_refused_by_name(models: Models, files: dict[str, str], match: str) -> None:
    folder = models.folder / "given"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    models.refused(CheckpointError, match, sft=folder)


def test_one_of_several_safetensors_files_can_be_given_by_its_path(models: Models) -> None:
    models.sft.joinpath(MODEL).rename(models.sft / "one.safetensors")
    models.sft.joinpath("two.safetensors").write_bytes(b"x")
    message = models.refused(CheckpointError, "give the one to use by its path")
    assert "one.safetensors" in message
    assert models.merge(sft=models.sft / "one.safetensors").status == "merged"


def test_the_latest_of_a_trainers_checkpoints_is_named_by_its_number(models: Models) -> None:
    folder = models.folder / "run"
    for step in (9, 10, 2, 100):
        write_model(folder / f"checkpoint-{step}", random_state(SHAPES), config=CONFIG)
    message = models.refused(CheckpointError, r"trainer's output folder.*checkpoint-100'?: give that", sft=folder)
    latest = next(word for word in re.split(r"[\s':]+", message) if word.endswith("checkpoint-100"))
    assert models.merge(sft=latest).status == "merged"


def test_what_does_not_exist_is_refused(models: Models) -> None:
    for sft in (models.folder / "gone", str(models.folder / "gone"), "a/b/c", "./org/name", Path("org/name")):
        models.refused(CheckpointError, r"sft .* does not exist; give a folder, a \.safetensors file or a hub", sft=sft)


@pytest.mark.parametrize("name", ["~nobody.here/sft", "x" * 300, ""])
def test_paths_that_cannot_be_are_refused_in_one_line(models: Models, name: str) -> None:
    models.refused(CheckpointError, r"sft .*(does not exist|cannot be|is empty)", sft=name)


def test_a_file_that_is_no_safetensors_file_is_refused(models: Models) -> None:
    path = models.folder / "model.gguf"
    path.write_bytes(b"x")
    models.refused(CheckpointError, r"sft .*model\.gguf is not a \.safetensors file; convert", sft=path)


def sharded(models: Models) -> dict[str, Any]:
    """Make sft a sharded model, and return its index."""
    (models.sft / MODEL).unlink()
    names = list(SHAPES)
    write_model(models.sft, random_state(SHAPES, seed=3), shards=[names[:2], names[2:]], config=CONFIG)
    index: dict[str, Any] = json.loads((models.sft / INDEX).read_text())
    return index


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
    models.refused(CheckpointError, rf"'{NORM}' lies in model-00001-of-.* but it lies in model-00002-of-.*again")
    index["weight_map"] |= {NORM: "model-00002-of-00002.safetensors", "ghost": "model-00001-of-00002.safetensors"}
    (models.sft / INDEX).write_text(json.dumps(index))
    models.refused(CheckpointError, r"'ghost' lies in model-00001-of-.* but it is in none of its files.*again")


def test_a_tensor_that_the_index_does_not_name_is_refused(models: Models) -> None:
    index = sharded(models)
    del index["weight_map"][NORM]
    (models.sft / INDEX).write_text(json.dumps(index))
    models.refused(CheckpointError, rf"stores 1 tensors that its {INDEX} does not name, first '{NORM}'.*again")


def test_a_tensor_in_two_shards_is_refused(models: Models) -> None:
    sharded(models)
    write_zeros(
        models.sft / "model-00002-of-00002.safetensors",
        {UP0: ("BF16", (8, 8)), UP1: ("BF16", (8, 8)), NORM: ("BF16", (8,)), HEAD: ("BF16", (32, 8))},
    )
    models.refused(CheckpointError, rf"stores tensor '{UP0}' twice, in model-00001\S+ and in model-00002")


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
    models.refused(CheckpointError, rf"{role} .*: vocab\.json is a broken link or no plain file; repair or remove it")


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


# --- arguments

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -0.1}, r"alpha is -0\.1; .*weight of the base.*0 <= alpha <= 1"),
    ({"alpha": 1.1}, r"alpha is 1\.1"),
    ({"alpha": float("nan")}, r"alpha is nan"),
    ({"alpha": "0.5"}, r"alpha is '0\.5'"),
    ({"alpha": True}, r"alpha is True"),
    ({"drop": 1}, r"drop is 1; .*0 <= drop < 1.*alpha=1"),
    ({"drop": -0.1}, r"drop is -0\.1"),
    ({"drop": float("nan")}, r"drop is nan"),
    ({"seed": 1.0}, r"seed is 1\.0; it must be an integer"),
    ({"seed": None}, r"seed is None"),
    ({"iteration": -1}, r"iteration is -1; rounds are counted by integers from 0"),
    ({"iteration": 0.5}, r"iteration is 0\.5"),
    ({"iteration": 0.0}, r"iteration is 0\.0"),
    ({"iteration": "1"}, r"iteration is '1'"),
    ({"workers": 0}, r"workers is 0; .*at least 1"),
    ({"workers": -1}, r"workers is -1"),
    ({"workers": 1.5}, r"workers is 1\.5"),
    ({"dtype": "float8"}, r"dtype is 'float8'; it must be one of base, bfloat16, float16, float32"),
    ({"dtype": torch.float16}, r"dtype is torch\.float16; it must be one of"),
    ({"reference": "sft"}, r"reference is 'sft'; it must be 'start' or 'base'"),
    ({"vocab": "larger"}, r"vocab is 'larger'.*'strict'"),
    ({"max_shard_size": "5 XB"}, r"size '5 XB' is not understood; write it as 5GB"),
    ({"max_shard_size": "5GB or so"}, r"size '5GB or so' is not understood"),
    ({"max_shard_size": 0}, r"size 0 must be at least one byte"),
    ({"max_shard_size": -5}, r"size -5 is not understood"),
    ({"max_shard_size": "0.5"}, r"size '0\.5' must be at least one byte"),
    ({"device": "tpu"}, r"device is 'tpu'; it must be cpu or cuda"),
    ({"keep": "norm"}, r"keep is a string; give a list of patterns, \['norm'\]"),
    ({"keep": [3]}, r"keep pattern '?3'? is not"),
    ({"keep": [re.compile("norm")]}, r"keep pattern .* is not"),
    ({"keep": ["(norm"]}, r"keep pattern '\(norm' is not a regular expression: .*"),
    ({"take": ["*"]}, r"take pattern '\*' is not a regular expression: .*"),
    ({"no_drop": ["["]}, r"no_drop pattern '\[' is not a regular expression: .*"),
    ({"keep": ["nrom"]}, r"--keep 'nrom' matches none of the 5 tensor names, such as 'lm_head\.weight'"),
    ({"take": ["^norm"]}, r"--take '\^norm' matches none of the 5"),
    ({"no_drop": ["norm", "nrom"]}, r"--no-drop 'nrom' matches none of the 5"),
    ({"keep": ["norm"], "take": ["model"]}, r"'model\.norm\.weight' is both kept and taken; change --keep or --take"),
]


@pytest.mark.parametrize(("options", "match"), ARGUMENTS, ids=[str(options) for options, _ in ARGUMENTS])
def test_arguments_out_of_range_are_refused(models: Models, options: dict[str, Any], match: str) -> None:
    models.refused(ArgumentError, match, **options)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), "2"])
def test_layer_factors_out_of_range_are_refused(factor: float) -> None:
    with pytest.raises(ArgumentError, match=r"factor is .*finite number >= 0"):
        dare_merge(torch.zeros(2), torch.ones(2), drop=0, factor=factor)


def test_a_factor_that_overflows_the_rescale_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"factor 1e\+38 / \(1 - drop 0\.999\) does not fit in float32"):
        dare_merge(torch.zeros(2), torch.ones(2), drop=0.999, factor=1e38, name="a")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(models: Models) -> None:
    models.refused(ArgumentError, r"device is 'cuda'.*no such device.*--device cpu", streaming=True, device="cuda")


L0, L1 = "model.layers.0", "model.layers.1"
IMPORTANCES: list[tuple[object, str]] = [
    ({L0: 1.0}, rf"layers model\.layers\.\* are given for 1 of 2: missing {L1}; name every layer of a stack or none"),
    ({L0: 1.0, L1: 1.0, "model.layers.7": 1.0}, rf"no tensor .* layer 'model\.layers\.7'.*its layers are {L0}, {L1}"),
    ({"0": 1.0, "1": 1.0, "2": 1.0}, r"no tensor of the model lies in layer 'model\.layers\.2'"),
    ({L0: -1.0, L1: 1.0}, rf"importance of layer '{L0}' is -1\.0; it must be .*finite.* >= 0"),
    ({L0: float("nan"), L1: 1.0}, rf"importance of layer '{L0}' is nan"),
    ({L0: float("inf"), L1: 1.0}, rf"importance of layer '{L0}' is inf"),
    ({L0: "much", L1: 1.0}, rf"importance of layer '{L0}' is 'much'"),
    ({L0: None, L1: 1.0}, rf"importance of layer '{L0}' is None"),
    ({L0: True, L1: 1.0}, rf"importance of layer '{L0}' is True"),
    ({L0: 10**400, L1: 1.0}, rf"importance of layer '{L0}' is 1000"),
    ({L0: 0.0, L1: 0.0}, r"importances sum to 0\.0; at least one must be > 0"),
    ({}, r"importance is empty; give one value for each layer"),
]


@pytest.mark.parametrize(("importance", "match"), IMPORTANCES, ids=[match[:30] for _, match in IMPORTANCES])
@pytest.mark.parametrize("form", ["mapping", "file", "file with layers"])
def test_importances_out_of_range_are_refused(models: Models, importance: object, match: str, form: str) -> None:
    given: Any = importance
    if form != "mapping":
        given = models.folder / "importance.json"
        given.write_text(json.dumps({"layers": importance} if form == "file with layers" else importance))
    models.refused(ArgumentError, match, importance=given)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[1.0, 2.0]", r"must hold a mapping"),
        (b'{"layers": [1.0, 2.0]}', r"must hold a mapping"),
        (b"1", r"must hold a mapping"),
        (b"", r"is not JSON"),
        (b"layer,importance", r"is not JSON"),
        (b"\xff\xfe", r"is not JSON"),
        (None, r"cannot be read: No such file"),
    ],
)
def test_importance_files_that_are_none_are_refused(models: Models, content: bytes | None, match: str) -> None:
    path = models.folder / "importance.json"
    if content is not None:
        path.write_bytes(content)
    models.refused(ArgumentError, rf"importance file .*importance\.json {match}", importance=path)


def test_an_importance_that_is_a_list_is_refused(models: Models) -> None:
    models.refused(ArgumentError, r"importance.*mapping", importance=[1.0, 2.0])


def test_plain_indices_need_a_single_stack_of_layers(models: Models) -> None:
    for role in ("base", "sft"):
        models.change(role, {"vision.blocks.0.weight": torch.zeros(2)})
    models.refused(
        ArgumentError, r"plain indices, .*2 stacks of layers \(model\.layers, vision\.blocks\); use full keys",
        importance={"0": 1.0, "1": 2.0},
    )  # fmt: skip


# --- start


def test_a_start_without_a_recipe_needs_the_round(models: Models) -> None:
    start = write_model(models.folder / "start", random_state(SHAPES), config=CONFIG)
    models.refused(ArgumentError, r"start \S+ has no imm_recipe\.json.*--iteration N \(counted from 0\)", start=start)
    assert models.merge(start=start, iteration=3).parameters["iteration"] == 3


def test_a_start_that_was_merged_tells_the_round(models: Models) -> None:
    models.merge(out=models.folder / "start", iteration=4)
    assert models.merge(start=models.folder / "start").parameters["iteration"] == 5


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"version": 1', '"version": 2', r"imm_recipe\.json is of version 2, this program reads 1; upgrade"),
        ('"format": "mergekit_imm recipe"', '"format": "other"', r"imm_recipe\.json is damaged: its format is"),
        ('"iteration": 0', '"iteration": -1', r"imm_recipe\.json is damaged: iteration is -1"),
        ('"iteration": 0', '"round": 0', r"imm_recipe\.json is damaged"),
        ('"history": []', '"history": {}', r"imm_recipe\.json is damaged: .*history"),
        ("{", "[", r"imm_recipe\.json is damaged"),
    ],
)
def test_a_start_with_a_recipe_that_cannot_be_read_is_refused(models: Models, old: str, new: str, match: str) -> None:
    start = models.folder / "start"
    models.merge(out=start)
    recipe = (start / "imm_recipe.json").read_text()
    assert old in recipe
    (start / "imm_recipe.json").write_text(recipe.replace(old, new, 1))
    models.refused(CheckpointError, match, start=start)


# --- the place of the output


def test_an_output_that_is_a_file_is_refused(models: Models) -> None:
    models.out.write_text("mine")
    models.refused(OutputError, r"output \S+out is a file; an output is a folder", overwrite=True)


@pytest.mark.parametrize("target", ["elsewhere", "gone"])
def test_an_output_that_is_a_link_is_refused(models: Models, target: str) -> None:
    (models.folder / "elsewhere").mkdir()
    models.out.symlink_to(models.folder / target)
    models.refused(OutputError, r"output \S+out is a link; give the folder it points to", overwrite=True)


@pytest.mark.parametrize("out", ["..", ".", "", "sub/..", "/"])
def test_an_output_without_a_name_of_its_own_is_refused(
    models: Models, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models.folder / "sub").mkdir()
    monkeypatch.chdir(models.folder / "sub")
    models.refused(OutputError, r"output .* has no name of its own; give a folder", out=out, overwrite=True)


def test_an_output_that_is_a_mount_point_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    models.out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == models.out)
    models.refused(OutputError, r"output \S+out is a mount point.*give a folder inside it")


@pytest.mark.parametrize("role", ["base", "sft", "start"])
def test_an_output_that_is_an_input_is_refused(models: Models, role: str) -> None:
    start = write_model(models.folder / "start", random_state(SHAPES), config=CONFIG)
    models.refused(
        OutputError, rf"output \S+{role} is, or contains, {role} .*give another output", out=models.folder / role,
        start=start, iteration=1, overwrite=True,
    )  # fmt: skip


def linked(models: Models, kind: str) -> tuple[Path | str, Path]:
    """Move sft into out; return a way to name it and one to name out."""
    inside = models.out / "deep" / "sft"
    inside.parent.mkdir(parents=True)
    models.sft.rename(inside)
    link = models.folder / "link"
    match kind:
        case "plain":
            return inside, models.out
        case "relative":
            return f"{models.folder}/out/../out/deep/../deep/sft", models.out
        case "input is a link":
            link.symlink_to(inside)
            return link, models.out
        case "input behind a link":
            link.symlink_to(models.out / "deep")
            return link / "sft", models.out
        case "output behind a link":
            link.symlink_to(models.folder)
            return inside, link / "out"
        case "a file":
            return inside / MODEL, models.out
        case "its file is a link":
            write_model(models.sft, {}, config=CONFIG)
            (models.sft / MODEL).unlink()
            (models.sft / MODEL).symlink_to(inside / MODEL)
            return models.sft, models.out
        case "its tokenizer is a link":
            write_model(models.sft, random_state(SHAPES), config=CONFIG)
            (models.sft / "tokenizer.json").symlink_to(inside / "tokenizer.json")
            return models.sft, models.out
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["plain", "relative", "input is a link", "input behind a link", "output behind a link", "a file",
     "its file is a link", "its tokenizer is a link"],
)  # fmt: skip
def test_an_input_inside_the_output_is_refused(models: Models, kind: str) -> None:
    sft, out = linked(models, kind)
    models.refused(OutputError, r"output \S+out is, or contains, sft .*give another", sft=sft, out=out, overwrite=True)


def test_an_input_inside_the_folder_that_the_output_is_built_in_is_refused(models: Models) -> None:
    (models.folder / PARTIAL).mkdir()
    sft = models.sft.rename(models.folder / PARTIAL / "sft")
    models.refused(OutputError, r"out\.partial is, or contains, sft", sft=sft, restart=True)


def test_an_importance_file_inside_the_output_survives(models: Models) -> None:
    models.merge()
    path = models.out / "importance.json"
    path.write_text(json.dumps({L0: 1.0, L1: 2.0}))
    models.refused(OutputError, r"output \S+out is, or contains, .*importance", importance=path, overwrite=True)


def test_an_output_inside_an_input_is_fine_and_not_part_of_it(models: Models) -> None:
    models.merge()
    first, second = models.base / "merged", models.sft / "runs-of-mine" / "merged"
    for out in (first, second, models.base / "again"):
        models.merge(out=out)
        assert files_of(out) == files_of(models.out)
    models.merge(out=first, alpha=0.3, overwrite=True)
    models.merge(alpha=0.3, overwrite=True)
    assert files_of(first) == files_of(models.out)


def test_an_unfinished_output_inside_an_input_is_not_part_of_it(models: Models) -> None:
    models.merge(out=models.folder / "before")
    interrupt(models, out=models.base / "other")
    (models.base / "other.partial" / "merges.txt").write_text("copied just before the interruption")
    models.merge()
    assert files_of(models.out) == files_of(models.folder / "before")


def test_what_an_output_inside_an_input_held_is_not_part_of_it(models: Models) -> None:
    models.merge()
    inside = models.base / "merged"
    inside.mkdir()
    (inside / "vocab.txt").write_text("something else")
    models.merge(out=inside, overwrite=True)
    assert files_of(inside) == files_of(models.out)


def test_an_output_that_holds_something_is_refused_without_overwrite(models: Models) -> None:
    models.out.mkdir()
    assert models.merge(dry_run=True).status == "dry run"
    (models.out / "notes.txt").write_text("mine")
    models.refused(OutputError, r"output \S+out is there and not empty; .*--overwrite")
    assert models.merge(overwrite=True).status == "merged"
    assert "notes.txt" not in files_of(models.out)


def test_an_output_of_another_recipe_is_refused_without_overwrite(models: Models) -> None:
    models.merge(alpha=0.3)
    models.refused(OutputError, r"is there and not empty; .*--overwrite")
    assert models.merge(alpha=0.3).status == "already merged"


def test_an_empty_output_is_fine(models: Models) -> None:
    models.out.mkdir()
    assert models.merge().status == "merged"


def test_an_output_in_the_home_of_nobody_is_refused(models: Models) -> None:
    models.refused(OutputError, r"output ~nobody\.here/out", out="~nobody.here/out")


def test_an_output_below_a_file_is_refused(models: Models) -> None:
    (models.folder / "file").write_text("mine")
    models.refused(OutputError, r"file.*Not a directory", out=models.folder / "file" / "out")


def interrupt(models: Models, **options: Any) -> None:
    """Begin a merge, and stop it."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.merge(progress=stop, **options)


def test_an_unfinished_merge_of_another_recipe_is_refused(models: Models) -> None:
    interrupt(models, alpha=0.3)
    models.refused(
        OutputError, r"out\.partial is an unfinished merge of another recipe \(parameters\.alpha: 0\.3, now 0\.5\)"
        r"; finish that one, or --restart to begin anew",
    )  # fmt: skip
    models.merge(out=models.folder / "fresh")
    models.merge(restart=True)
    assert files_of(models.out) == files_of(models.folder / "fresh")
    assert not (models.folder / PARTIAL).exists()


def test_an_unfinished_merge_of_an_input_that_changed_is_refused(models: Models) -> None:
    interrupt(models)
    models.change("sft", {UP0: torch.ones(8, 8, dtype=torch.bfloat16)})
    models.refused(OutputError, r"unfinished merge of another recipe \(inputs\.sft\.files\.model\.safetensors has changed.*--restart")


def test_a_folder_of_others_in_the_place_of_the_unfinished_merge_is_refused(models: Models) -> None:
    partial = models.folder / PARTIAL
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    models.refused(OutputError, r"out\.partial is there and is not a merge under way; remove it, or --restart")
    models.merge(restart=True)
    assert "notes.txt" not in files_of(models.out)


def test_a_file_in_the_place_of_the_unfinished_merge_is_refused(models: Models) -> None:
    (models.folder / PARTIAL).write_text("mine")
    models.refused(OutputError, r"out\.partial")


@pytest.mark.parametrize("restart", [False, True])
def test_a_link_in_the_place_of_the_unfinished_merge_is_refused(models: Models, restart: bool) -> None:
    elsewhere = models.folder / "elsewhere"
    elsewhere.mkdir()
    if restart:
        (elsewhere / "notes.txt").write_text("mine")
    (models.folder / PARTIAL).symlink_to(elsewhere)
    models.refused(OutputError, r"out\.partial.* is a link", restart=restart)


def test_a_merge_that_was_cut_off_at_its_first_byte_goes_on(models: Models) -> None:
    partial = models.folder / PARTIAL
    partial.mkdir()
    (partial / (output.JOURNAL + ".new")).write_bytes(b'{"form')
    assert models.merge().status == "merged"
    assert set(files_of(models.out)) == {
        MODEL, "config.json", "imm_recipe.json", "imm_report.json", "README.md", *SIDE
    }  # fmt: skip


def test_a_merge_that_another_process_writes_is_refused(models: Models) -> None:
    interrupt(models)
    with output.locked(models.folder / PARTIAL):
        models.refused(OutputError, r"out\.partial is being written by another merge; wait", streaming=True)
    assert models.merge().status == "merged"


def test_too_little_space_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = models.merge(dry_run=True).disk_needed
    monkeypatch.setattr(output, "free_space", lambda _: needed - 1)
    models.refused(OutputError, r"output \S+out needs .* and its disk has .* free; free some space or give")
    monkeypatch.setattr(output, "free_space", lambda _: needed)
    assert models.merge().status == "merged"


def test_a_disk_that_fills_up_is_no_end(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    inputs = everything(models.base) | everything(models.sft)
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_all", full)
        with pytest.raises(OutputError, match=r"\Sout.* cannot be written: No space left.*the same command again"):
            models.merge()
    assert not models.out.exists()
    assert models.merge().status == "merged"
    assert everything(models.base) | everything(models.sft) == inputs


# --- what only the tensors tell


def test_an_input_that_is_cut_off_during_the_merge_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(descriptor: int, size: int) -> None:
        with (models.sft / MODEL).open("r+b") as file:
            file.truncate(1000)

    monkeypatch.setattr(output, "allocate", cut)
    with pytest.raises(CheckpointError, match=rf"sft/{MODEL} ended at byte 1000: it was changed or cut off during"):
        models.merge()
    assert not models.out.exists()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("role", ["base", "sft", "start"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(NAN, torch.bfloat16), (INF, torch.bfloat16), (-INF, torch.float16), (NAN, torch.float32), (INF, torch.float64)],
)
def test_values_that_are_not_finite_are_refused(models: Models, role: str, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(8, 8, dtype=dtype)
    bad.view(-1)[[5, 40]] = value
    start = models.folder / "start"
    for each in ("base", "sft", "start"):
        state = {UP0: bad if each == role else torch.ones(8, 8, dtype=dtype), NORM: torch.ones(8, dtype=dtype)}
        write_model(models.folder / each, state)
    models.refused(
        NonFiniteError, rf"'{re.escape(UP0)}' of {role} \S+{role} has 2 NaN or infinite of 64 elements, the first at"
        r" index 5; .*--allow-nonfinite.*--(keep|take) '", streaming=True, start=start, iteration=1,
    )  # fmt: skip


@pytest.mark.parametrize(("alpha", "drop"), [(1.0, 0.5), (0.0, 0.5), (0.5, 0.99999), (0.5, 0.0)])
@pytest.mark.parametrize("role", ["base", "sft"])
def test_values_that_are_not_finite_are_refused_even_where_they_do_not_count(
    models: Models, role: str, alpha: float, drop: float
) -> None:
    models.change(role, {NORM: torch.full((8,), torch.nan, dtype=torch.bfloat16)})
    models.refused(NonFiniteError, f"{NORM}.* 8 NaN", streaming=True, alpha=alpha, drop=drop)


def test_the_same_value_is_refused_whatever_the_number_of_workers(models: Models) -> None:
    for role in ("base", "sft"):
        state = {f"w.{i}": torch.zeros(1 << 21, dtype=torch.bfloat16) for i in range(4)}
        if role == "sft":
            state["w.1"][[1_500_000, 1_600_000]] = torch.inf
            state["w.2"][0] = torch.nan
            state["w.3"][7] = torch.nan
        write_model(getattr(models, role), state)
    match = r"'w\.1' of sft .* has 2 NaN or infinite of 2097152 elements, the first at index 1500000"
    messages = {models.refused(NonFiniteError, match, streaming=True, workers=workers) for workers in (1, 2, 4, 4, 9)}
    assert len(messages) == 1


@pytest.mark.parametrize("role", ["base", "sft"])
def test_the_option_shown_for_a_value_that_is_not_finite_avoids_it(models: Models, role: str) -> None:
    models.change(role, {UP0: torch.full((8, 8), torch.nan, dtype=torch.bfloat16)})
    (shown,) = shown_options(models.refused(NonFiniteError, r"--(keep|take) '", streaming=True))
    report = models.merge(**shown)
    assert report.tensors["kept"] + report.tensors["taken"] == 1
    assert all(tensor.isfinite().all() for tensor in models.merged().values())


def test_a_refused_value_leaves_the_old_output_as_it_was(models: Models) -> None:
    models.merge()
    models.change("sft", {UP0: torch.full((8, 8), torch.nan, dtype=torch.bfloat16)})
    models.refused(NonFiniteError, r"NaN", streaming=True, overwrite=True)


def test_a_refused_value_leaves_no_parents_of_the_output_behind(models: Models) -> None:
    models.change("sft", {UP0: torch.full((8, 8), torch.nan, dtype=torch.bfloat16)})
    models.refused(NonFiniteError, r"NaN", streaming=True, out=models.folder / "new" / "deep" / "out")


BITS = {
    torch.bfloat16: (torch.int16, 0x7FC0, [0x7F80, 0xFF80, 0x7F81, 0xFFC0, 0xFFFF]),
    torch.float16: (torch.int16, 0x7E00, [0x7C00, 0xFC00, 0x7C01, 0xFE00, 0xFFFF]),
    torch.float32: (torch.int32, 0x7FC00000, [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF]),
    torch.float64: (torch.int64, 0x7FF8 << 48, [0x7FF0 << 48, 0xFFF0 << 48, (0x7FF0 << 48) + 1, (1 << 64) - 1]),
}


def from_bits(bits: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    whole = BITS[dtype][0]
    width = torch.iinfo(whole).bits
    return torch.tensor([b - (1 << width) if b >> (width - 1) else b for b in bits], dtype=whole).view(dtype)


@pytest.mark.parametrize("dtype", BITS)
def test_values_that_are_not_finite_go_through_as_canonical_nans_if_allowed(models: Models, dtype: torch.dtype) -> None:
    values = from_bits(BITS[dtype][2], dtype)
    for role in ("base", "sft"):
        write_model(getattr(models, role), {"w": values if role == "sft" else torch.zeros_like(values)})
    models.refused(NonFiniteError, r"'w' of sft", streaming=True, drop=0.0)
    canonical = from_bits([BITS[dtype][1]], dtype)
    for alpha in (0.0, 0.5):
        models.merge(alpha=alpha, drop=0.0, allow_nonfinite=True, overwrite=True)
        merged = models.merged()["w"]
        expected = values if alpha == 0 else values * torch.nan  # infinity / 2 is infinity - infinity / 2 here
        assert same_bits(merged, torch.where(expected.isnan(), canonical, expected))
        json.loads((models.out / "imm_report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(("option", "role"), [("keep", "base"), ("take", "sft")])
def test_kept_and_taken_tensors_are_not_checked_and_stay_bit_for_bit(models: Models, option: str, role: str) -> None:
    values = from_bits([*BITS[torch.bfloat16][2], 0x3F80], torch.bfloat16)
    for each in ("base", "sft"):
        models.change(each, {UP0: values if each == role else torch.zeros_like(values)})
    models.merge(**{option: [re.escape(UP0)]})
    assert same_bits(models.merged()[UP0], values)


@pytest.mark.parametrize(("option", "role"), [("keep", "base"), ("take", "sft")])
def test_kept_and_taken_tensors_are_not_checked_in_another_dtype_either(models: Models, option: str, role: str) -> None:
    values = from_bits([*BITS[torch.bfloat16][2], 0x3F80], torch.bfloat16)
    models.change(role, {UP0: values})
    models.merge(dtype="float32", **{option: [re.escape(UP0)]})
    canonical = from_bits([BITS[torch.float32][1]], torch.float32)
    assert same_bits(models.merged()[UP0], torch.where(values.isnan(), canonical, values.float()))


def test_a_value_too_large_for_the_output_dtype_is_refused(models: Models) -> None:
    for role in ("base", "sft"):
        models.change(role, {UP0: torch.full((8, 8), 1e5, dtype=torch.bfloat16)})
    message = models.refused(
        NonFiniteError, rf"'{re.escape(UP0)}': the merged value of element 0 is too large for the output dtype F16; use"
        r" --dtype bfloat16", streaming=True, dtype="float16",
    )  # fmt: skip
    assert "--allow-nonfinite" not in message
    models.refused(NonFiniteError, r"too large", streaming=True, dtype="float16", allow_nonfinite=True)
    assert models.merge(dtype="bfloat16").status == "merged"


def test_a_rescaled_delta_too_large_for_the_output_dtype_is_refused(models: Models) -> None:
    models.change("base", {UP0: torch.zeros(8, 8, dtype=torch.float16)})
    models.change("sft", {UP0: torch.full((8, 8), 6e4, dtype=torch.float16)})
    models.refused(NonFiniteError, r"too large for the output dtype F16", streaming=True, alpha=0.0, drop=0.5)
    assert models.merge(alpha=0.0, drop=0.0).status == "merged"


def test_a_sum_that_overflows_is_not_blamed_on_a_dtype_it_already_has(models: Models) -> None:
    for role, value in (("base", 3e38), ("sft", -3e38)):
        models.change(role, {UP0: torch.full((8, 8), value)})
    message = models.refused(NonFiniteError, rf"{re.escape(UP0)}': .*element 0.*too large.*F32", streaming=True)
    assert "--dtype float32" not in message


@pytest.mark.parametrize(("option", "role"), [("keep", "base"), ("take", "sft")])
def test_a_kept_or_taken_value_too_large_for_the_output_dtype_is_refused(
    models: Models, option: str, role: str
) -> None:
    models.change(role, {UP0: torch.full((8, 8), 1e5, dtype=torch.bfloat16)})
    models.refused(
        NonFiniteError, r"too large for the output dtype F16", streaming=True, dtype="float16",
        **{option: [re.escape(UP0)]},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("role", ["sft", "start"])
def test_integers_that_differ_are_refused_and_the_options_shown_work(
    models: Models, role: str, dtype: torch.dtype
) -> None:
    start = models.folder / "start"
    for each in ("base", "sft", "start"):
        steps = torch.ones(9, dtype=dtype)
        steps[6:] = 0 if each == role else 1
        write_model(models.folder / each, {**random_state(SHAPES), STEPS: steps})
    message = models.refused(
        MismatchError, rf"'{re.escape(STEPS)}' is \w+ and not merged, but it differs at element 6 between base \S+base"
        rf" and {role} \S+{role}; .*--keep .*--take", streaming=True, start=start, iteration=1,
    )  # fmt: skip
    shown = shown_options(message)
    assert [list(option) for option in shown] == [["keep"], ["take"]]
    for option in shown:
        models.merge(start=start, iteration=1, overwrite=True, **option)
        source = read_model(models.base if "keep" in option else models.sft)
        assert same_bits(models.merged()[STEPS], source[STEPS])


# --- the same refusals, and what a merge that is not refused leaves


@pytest.mark.parametrize(
    ("options", "error"),
    [({"alpha": 2}, ArgumentError), ({"sft": "a/b/c"}, CheckpointError), ({"keep": ["nrom"]}, ArgumentError),
     ({"workers": 0}, ArgumentError), ({"device": "tpu"}, ArgumentError)],
)  # fmt: skip
def test_iter_merged_refuses_with_the_same_words_before_the_first_tensor(
    models: Models, options: dict[str, Any], error: type[MergeError]
) -> None:
    message = models.refused(error, ".", **options)
    options = {"workers": 1, **options}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        iter_merged(models.base, options.pop("sft", models.sft), **options)


def test_iter_merged_refuses_values_that_are_not_finite(models: Models) -> None:
    models.change("sft", {NORM: torch.full((8,), torch.nan, dtype=torch.bfloat16)})
    message = models.refused(NonFiniteError, "NaN", streaming=True)
    tensors: Iterator[Any] = iter_merged(models.base, models.sft)
    with pytest.raises(NonFiniteError, match=f"^{re.escape(message)}$"):
        list(tensors)


def test_every_error_is_a_merge_error_and_those_of_values_are_value_errors() -> None:
    kinds = (ArgumentError, CheckpointError, MismatchError, NonFiniteError, OutputError)
    assert all(issubclass(kind, MergeError) for kind in kinds)
    assert [kind for kind in kinds if issubclass(kind, ValueError)] == [ArgumentError, MismatchError]


def test_what_is_copied_keeps_its_bytes_and_what_is_written_is_strict_json(models: Models) -> None:
    sharded(models)
    inputs = everything(models.folder / "base") | everything(models.folder / "sft")
    models.merge(max_shard_size=300)
    left = files_of(models.out)
    for name in ("config.json", *SIDE):
        assert left[name] == (models.sft / name).read_bytes()
    for name in ("imm_recipe.json", "imm_report.json", INDEX):
        assert isinstance(json.loads(left[name], parse_constant=pytest.fail), dict)
    assert sorted(json.loads(left[INDEX])["weight_map"]) == sorted(SHAPES)
    assert everything(models.folder / "base") | everything(models.folder / "sft") == inputs


def test_side_files_come_from_sft_else_from_base(models: Models) -> None:
    (models.sft / "tokenizer.json").write_bytes(b'{"b":2}\r\n\xff')
    (models.base / "only_base.txt").write_bytes(b"\x00\xfe")
    (models.sft / "templates" / "chat.jinja").unlink()
    models.merge()
    left = files_of(models.out)
    assert left["tokenizer.json"] == b'{"b":2}\r\n\xff'
    assert left["only_base.txt"] == b"\x00\xfe"
    assert left["templates/chat.jinja"] == SIDE["templates/chat.jinja"].encode()
