"""Files of torch.save."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from checkpoints import State, read_model, write_model
from mergekit_imm import merge_checkpoints, verify
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.checkpoint.torch_file import open_torch_file
from mergekit_imm.plan import shard_layout
from mergekit_imm.testing import check_input
from models import load, new_model
from other_forms import BASE, CONFIG, SFT, held, raw, save_bin, save_dcp, save_shards, weights


def test_a_file_of_torch_save_is_merged(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text(json.dumps(CONFIG))
    check_input(save_bin(SFT, tmp_path / "sft"), SFT)


@pytest.mark.parametrize(
    "save", [save_shards, lambda s, f: save_bin(s, f, "pytorch_model_fsdp.bin")], ids=["index", "fsdp"]
)
def test_so_are_its_other_names(tmp_path: Path, save: Callable[[State, Path], Path]) -> None:
    check_input(save(SFT, tmp_path / "sft"), SFT)


def test_every_way_to_hold_a_tensor_is_read(tmp_path: Path) -> None:
    whole = torch.randn(10, 6, 4)
    kinds = [torch.float64, torch.float16, torch.bool, torch.int8, torch.uint16, torch.complex64, torch.float8_e4m3fn]
    state = {
        "all": whole,
        "rows": whole[3:7],
        "same": whole,
        "parameter": torch.nn.Parameter(whole[0]),
        "number": torch.tensor(2.0),
        "none": torch.empty(0, 3),
        "none of some": whole[10:],
        "one of a column": whole[:, 3:4, :1][4],
        "a line": whole.transpose(0, 1)[:1, :1],
        **{str(kind): torch.ones(3).to(kind) for kind in kinds},
    }
    torch.save(state, tmp_path / "some.bin")
    found = open_torch_file(tmp_path / "some.bin", "some.bin")
    content = (tmp_path / "some.bin").read_bytes()
    assert {t.name: t.shape for t in found.tensors} == {name: tuple(t.shape) for name, t in state.items()}
    assert {t.name: content[t.begin : t.begin + t.nbytes] for t in found.tensors} == {
        name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state.items()
    }


def test_a_file_of_more_than_4_gb_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.bin"
    with torch.serialization.skip_data():  # leaves a hole in the file
        torch.save({"a": torch.empty(4_400_000_000, dtype=torch.uint8), "b": torch.zeros(5)}, path)
    pread, read = os.pread, []

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        read.append(count)
        return pread(descriptor, count, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", counted)
        large, small = open_torch_file(path, "large.bin").tensors
    assert 0 < sum(read) < 10_000, "no tensor is read"
    assert (large.name, large.nbytes, small.name, small.shape) == ("a", 4_400_000_000, "b", (5,))
    with path.open("r+b") as file:
        file.seek(small.begin)
        file.write(np.arange(5, dtype=np.float32).tobytes())
    assert torch.equal(torch.load(path, mmap=True)["b"], torch.arange(5.0))


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save_bin(SFT, tmp_path / "sft") / "pytorch_model.bin"
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("pytorch_model/data.pkl").CRC == 0
    assert held(open_checkpoint(tmp_path / "sft", "sft")) == raw(SFT)


def test_a_model_of_transformers_is_merged_and_loaded(tmp_path: Path) -> None:
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "sft").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "sft")
    base = read_model(tmp_path / "base")
    tuned = {name: tensor + 0.01 for name, tensor in base.items()}
    shutil.copytree(tmp_path / "base", tmp_path / "plain")
    write_model(tmp_path / "plain", tuned)
    save_bin(tuned, tmp_path / "sft")
    for sft in ("plain", "sft"):
        merge_checkpoints(tmp_path / "base", tmp_path / sft, tmp_path / f"out-{sft}")
    assert weights(tmp_path / "out-sft") == weights(tmp_path / "out-plain")
    load(tmp_path / "out-sft", "llama")


@pytest.mark.parametrize("form", ["bin", "dcp"])
@pytest.mark.parametrize("limit", [5_000_000_000, 5000])
def test_a_base_of_another_form_gives_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, limit: int
) -> None:
    monkeypatch.setattr(shard_layout, "SHARD_SIZE", limit)
    save = {"bin": save_shards, "dcp": save_dcp}[form]
    base, sft = save(BASE, tmp_path / "base"), write_model(tmp_path / "sft", SFT)
    plain = write_model(tmp_path / "plain", BASE)
    merge_checkpoints(base, sft, tmp_path / "out", drop=0.5)
    merge_checkpoints(plain, sft, tmp_path / "expected", drop=0.5, max_shard_size=f"{limit}B")
    assert raw(read_model(tmp_path / "out")) == raw(read_model(tmp_path / "expected"))
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) == (2 if limit == 5000 else 1)
    verify(tmp_path / "out")


def test_safetensors_win(tmp_path: Path) -> None:
    sft = write_model(tmp_path / "sft", SFT)
    save_bin({"other": torch.ones(3)}, sft)
    save_dcp({"other": torch.ones(3)}, sft)
    assert set(open_checkpoint(sft, "sft").tensors) == set(SFT)
    assert "pytorch_model.bin" in open_checkpoint(sft, "sft").left_out


def test_an_adapter_in_a_file_of_torch_save_is_the_same(tmp_path: Path) -> None:
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        wrapped.save_pretrained(tmp_path / "plain")
        wrapped.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "adapter_model.bin").exists()
    for form in ("plain", "bin"):
        merge_checkpoints(tmp_path / "base", tmp_path / form, tmp_path / f"out-{form}", drop=0.5)
    assert weights(tmp_path / "out-bin") == weights(tmp_path / "out-plain")
    verify(tmp_path / "out-bin")
