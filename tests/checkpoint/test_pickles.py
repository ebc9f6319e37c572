"""State dicts that torch.load reads, other than those of current torch.save."""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import State, write_model
from mergekit_imm import merge_checkpoints
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.testing import check_input
from other_forms import BASE, SFT, held, raw, save_bin


class NumberedPickler(pickle.Pickler):
    """Pickles tensors as litgpt does, with numbers as storage keys."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[torch.UntypedStorage] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        storage = obj._untyped_storage
        at = next((n for n, one in enumerate(self.storages) if one._cdata == storage._cdata), len(self.storages))
        self.storages[at:] = self.storages[at:] or [storage]
        kind = {torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage}[obj.dtype]
        return "storage", kind, at, "cpu", len(storage) // (2 if obj.dtype == torch.bfloat16 else 8)


def save_numbered(state: State, path: Path) -> None:
    stream = io.BytesIO()
    pickler = NumberedPickler(stream)
    pickler.dump(state)
    path.parent.mkdir()
    writer = torch._C.PyTorchFileWriter(str(path))
    for number, storage in enumerate(pickler.storages):
        content = bytes(iter(storage))
        writer.write_record(f"data/{number}", content, len(content))
    writer.write_record("data.pkl", stream.getvalue(), len(stream.getvalue()))
    writer.write_end_of_file()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_may_be_numbered(tmp_path: Path) -> None:
    """In litgpt's converted models queries, keys and values are views of one storage."""
    name = "model.layers.0.w.weight"
    state = {**SFT, name: torch.cat([SFT[name], SFT[name]])[len(SFT[name]) :]}
    path = tmp_path / "sft" / "pytorch_model.bin"
    save_numbered(state, path)
    loaded = torch.load(path, weights_only=True)
    assert raw(loaded) == raw(SFT)
    check_input(tmp_path / "sft", SFT)


def with_attributes(tensor: torch.Tensor) -> torch.Tensor:
    tensor.sequence_parallel = True  # type: ignore[attr-defined]
    return tensor


BESIDE: dict[str, Any] = {
    "none": None,
    "integer": 3,
    "long": 10**30,
    "float": 0.5,
    "text": "x",
    "bytes": b"abc",
    "array": bytearray(b"x"),
    "set": {1, 2},
    "complex": 1j,
    "size": torch.Size([2]),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "layout": torch.strided,
    "counter": Counter("aab"),
    "list": [1, [2]],
    "mapping": {"a": {3: 4}},
}


@pytest.mark.parametrize("key", BESIDE)
def test_what_is_no_tensor_is_left_out_and_said(tmp_path: Path, key: str) -> None:
    sft = save_bin({**SFT, key: BESIDE[key]}, tmp_path / "sft")
    assert torch.load(sft / "pytorch_model.bin", weights_only=True)[key] == BESIDE[key]
    found = open_checkpoint(sft, "sft")
    assert held(found) == raw(SFT)
    (note,) = found.notes
    assert note.code == "not tensors"
    assert str(note) == f"note: left out of {sft}/pytorch_model.bin, as they are no tensors: {key}"


def test_notes_of_a_file_are_those_of_the_merge(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE)
    sft = save_bin({**SFT, **BESIDE}, tmp_path / "sft")
    report = merge_checkpoints(base, sft, tmp_path / "out")
    assert [note for note in report.notes if note.endswith("no tensors: none, integer, long, float, …")]


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
@pytest.mark.parametrize("beside", [{}, {"epoch": 3, "hyper_parameters": {"lr": [1e-3]}}], ids=["alone", "beside"])
def test_a_model_may_lie_under_a_name(tmp_path: Path, key: str, beside: dict[str, Any]) -> None:
    found = open_checkpoint(save_bin({**beside, key: OrderedDict(SFT)}, tmp_path / "sft"), "sft")
    assert held(found) == raw(SFT)
    assert [note.fields["names"] for note in found.notes] == ([", ".join(beside)] if beside else [])


def test_a_tensor_may_be_called_so(tmp_path: Path) -> None:
    state = {"model": torch.ones(3), "module": torch.zeros(2)}
    assert held(open_checkpoint(save_bin(state, tmp_path / "sft"), "sft")) == raw(state)


def test_attributes_of_tensors_are_no_matter(tmp_path: Path) -> None:
    whole = torch.randn(3, 4)
    state = {
        "tensor": with_attributes(torch.randn(3)),
        "parameter": with_attributes(torch.nn.Parameter(torch.randn(2, 2))),
        "row": with_attributes(whole[1]),
    }
    sft = save_bin(state, tmp_path / "sft")
    assert torch.load(sft / "pytorch_model.bin", weights_only=True)["parameter"].sequence_parallel
    assert held(open_checkpoint(sft, "sft")) == raw({name: tensor.detach() for name, tensor in state.items()})


def test_many_mentions_of_one_list_cost_no_time(tmp_path: Path) -> None:
    """A pickle may refer to one list a million times, and nest lists, each twice."""
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    sft = save_bin({**SFT, **{f"x{n}": nested for n in range(1000)}}, tmp_path / "sft")
    assert held(open_checkpoint(sft, "sft")) == raw(SFT)
