"""Formats that are not supported: refused by name, with the command to run."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import write_model
from mergekit_imm import CheckpointError, merge_checkpoints
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from other_forms import BASE, SFT, Evil, save_shards


def rewritten(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Rewrite a zip archive with other contents."""
    with zipfile.ZipFile(path) as before:
        contents = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(path, "w", method) as after:
        for name, content in contents.items():
            after.writestr(name, change(name, content))


def big_endian(name: str, content: bytes) -> bytes:
    return b"big" if name.endswith("byteorder") else content


def repacked(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Save the sft by torch.save, then rewrite the archive with other contents."""
    torch.save(SFT, path)
    rewritten(path, change, method)


def cut_off(path: Path) -> None:
    torch.save(SFT, path)
    path.write_bytes(path.read_bytes()[:-9])


def surrounded(path: Path, before: bytes = b"", after: bytes = b"") -> None:
    torch.save(SFT, path)
    path.write_bytes(before + path.read_bytes() + after)


def with_two_of_a_name(path: Path) -> None:
    repacked(path, lambda _, content: content)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("pytorch_model/data/0", b"again")


def with_one_entry_in_another(path: Path) -> None:
    """Let the directory place an entry where another is, whose header has a copy of its name."""
    repacked(path, lambda _, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        first, second = (archive.getinfo(f"pytorch_model/data/{number}") for number in (0, 1))
        second.header_offset = first.header_offset
        archive.writestr("pytorch_model/more", b"")  # writes the directory again


def of(value: Any) -> Callable[[Path], None]:
    """Return a function that saves a value by torch.save."""
    return lambda path: torch.save(value, path)


COMPLEX = torch.ones(3, dtype=torch.complex64)
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (
        lambda p: torch.save({"a": Evil(p.parent / "trap")}, p),
        r"holds a posix\.system, .*if you trust it, .*weights_only=False",
    ),
    "a whole module": (of(torch.nn.Linear(2, 2)), r"holds a torch\.nn\.modules\.linear\.Linear"),
    "sparse": (
        of({"a": torch.eye(3).to_sparse()}),
        r"holds a torch\._utils\._rebuild_sparse_tensor, .*`\.to_dense\(\)`",
    ),
    "an unknown dtype": (
        of({"a": COMPLEX.to(torch.complex128)}),
        r"holds a torch\.ComplexDoubleStorage, which is not read; ",
    ),
    "the old form": (
        lambda p: torch.save(SFT, p, _use_new_zipfile_serialization=False),
        r"before version 1\.6; .*`torch\.save`",
    ),
    "compressed": (lambda p: repacked(p, lambda _, c: c, zipfile.ZIP_DEFLATED), r"is compressed, .*`torch\.save`"),
    "big-endian": (lambda p: repacked(p, big_endian), r"big-endian.*little-endian machine"),
    "turned": (of({"a": torch.ones(3, 4).t()}), r"'a', \[4, 3\], .*strides \[1, 4\].*contiguous"),
    "expanded": (of({"a": torch.ones(3).expand(4, 3)}), r"'a', \[4, 3\], .*strides \[0, 1\]"),
    "conjugate": (of({"a": COMPLEX.conj()}), r"conjugate .*`\.resolve_conj\(\)"),
    "an optimizer": (
        of({"model": SFT, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}),
        "more than a model: tensors under 'optimizer', beside 'model'; .*`torch.save` what is under 'model' alone",
    ),
    "nested": (of({"a": torch.ones(3), "more": {"b": torch.ones(3)}}), "a mapping under 'more'"),
    "nested deeper": (of({"a": torch.ones(3), "more": [{"b": ({1: torch.ones(3)},)}]}), "list of tensors under 'more'"),
    "a set": (of({"a": torch.ones(3), "more": {torch.ones(3)}}), "list of tensors under 'more'"),
    "a storage": (of({"a": torch.ones(3), "b": torch.ones(3).untyped_storage()}), "a storage .*under 'b'"),
    "numbers alone": (of({"step": 3}), "no mapping of names to tensors"),
    "a name that is none": (of({3: torch.ones(3)}), "holds something under 3, which is no name"),
    "a tensor": (of(torch.ones(3)), "no mapping of names to tensors"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "no whole file of torch.save: .*no data.pkl"),
    "a pipe": (os.mkfifo, "cannot be read: it is not a plain file"),
    "cut off": (cut_off, "no whole file of torch.save"),
    "bytes before it": (lambda p: surrounded(p, before=b"x" * 64), "torch.save: it does not begin as a zip archive"),
    "bytes after it": (lambda p: surrounded(p, after=b"x"), "torch.save: it does not end as a zip archive"),
    "a name twice": (with_two_of_a_name, "torch.save: it holds 'pytorch_model/data/0' twice"),
    "one entry in another": (with_one_entry_in_another, "'pytorch_model/data/1' is not where its directory says"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, case: str) -> None:
    save, match = REFUSED[case]
    write_model(tmp_path / "base", BASE)
    (tmp_path / "sft").mkdir()
    save(tmp_path / "sft" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=match) as caught:
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "sft"]
    if case == "code":
        torch.load(tmp_path / "sft" / "pytorch_model.bin", weights_only=False)
        assert (tmp_path / "sft" / "trap").exists(), "it is a trap"


def test_an_index_of_such_files_must_be_right(tmp_path: Path) -> None:
    sft = save_shards(SFT, tmp_path / "sft")
    index = json.loads((sft / "pytorch_model.bin.index.json").read_text())
    for change, match in (
        ({"a": "../x.bin"}, "only plain names"),
        ({"a": "x.safetensors"}, r"index\.json names 'x\.safetensors', which is not a \.bin file"),
        ({"a": "x.bin"}, r"lacks x\.bin .*pytorch_model\.bin\.index\.json names"),
        ({"a": "pytorch_model-00001-of-00002.bin"}, r"bin\.index\.json says tensor 'a' is in .* none of its files"),
    ):
        changed = {"weight_map": index["weight_map"] | change}
        (sft / "pytorch_model.bin.index.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(sft, "sft")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (
            ["zero_to_fp32.py", "latest", "rng_state_0.pth"],
            r"DeepSpeed checkpoint; .*`cd '\S+/a b' && python zero_to_fp32\.py \. OUT`, and give '\S+/a b'/OUT",
        ),
        (["global_step5/mp_rank_00_model_states.pt"], "a DeepSpeed checkpoint"),
        (["mp_rank_00_model_states.pt"], "a part of a DeepSpeed checkpoint.*the folder that contains it"),
        (
            ["model_world_size_2_rank_0.pt", "optim_world_size_2_rank_0.pt"],
            r"verl ranks; .*`python -m verl\.model_merger merge --backend fsdp --local_dir '\S+/a b' --target_dir OUT`",
        ),
        (
            ["lit_model.pth", "model_config.yaml"],
            r"a LitGPT checkpoint; .*`litgpt convert_from_litgpt '\S+/a b' OUT && mv OUT/model\.pth OUT/pytorch_model",
        ),
        (["model.pth"], r"`mv '\S+/a b'/model\.pth '\S+/a b'/pytorch_model\.bin`"),
        (["pytorch_model_fsdp_0_rank0.bin"], "shards of FSDP ranks.*SHARDED_STATE_DICT"),
        ([".metadata", "common.pt"], "a Megatron checkpoint.*Megatron Bridge"),
        (["iter_0000005/x", "latest_checkpointed_iteration.txt"], "a Megatron checkpoint"),
    ],
)
def test_other_forms_are_refused_with_what_to_run(tmp_path: Path, names: list[str], match: str) -> None:
    sft = tmp_path / "a b"
    for name in names:
        (sft / name).parent.mkdir(parents=True, exist_ok=True)
        (sft / name).write_text("x")
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(sft, "sft")
