"""Models in other forms than safetensors files: written by torch, transformers, peft; merged as the same model is that
safetensors holds, to the byte."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import state_dict_saver

from checkpoints import State, files_of, random_state, read_model, write_model
from mergekit_imm import CheckpointError, MergeError, layout, merge_checkpoints, verify
from mergekit_imm.checkpoint.computed import Pieces
from mergekit_imm.checkpoint.computed import Tensor as Held
from mergekit_imm.checkpoint.pickled import open_pickled
from mergekit_imm.checkpoint.pieces import joined
from mergekit_imm.checkpoint.source import Checkpoint, open_checkpoint
from mergekit_imm.checkpoint.tensorfile import TensorInfo
from mergekit_imm.errors import ChangedError
from mergekit_imm.reading import Files
from models import load, new_model

SHAPES = {
    "model.embed_tokens.weight": (97, 33),
    "model.layers.0.w.weight": (64, 31),
    "model.layers.0.w.bias": (7,),
    "model.layers.0.conv": (5, 6, 7),
    "model.layers.1.w.weight": (1, 3),
    "model.norm.weight": (1,),
}
CONFIG = {"architectures": ["Tiny"], "model_type": "tiny", "dtype": "bfloat16", "tie_word_embeddings": False}
STEPS = "model.steps"


def states() -> tuple[State, State]:
    """The tensors of a base and of what was tuned from it, integers among them."""
    base = random_state(SHAPES) | {STEPS: torch.arange(5)}
    tuned = random_state(SHAPES, seed=1, scale=0.001)
    return base, {name: tensor + tuned[name] if name in tuned else tensor for name, tensor in base.items()}


BASE, SFT = states()
FLOATS = {name: tensor for name, tensor in SFT.items() if name != STEPS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks of a training run stored: the sft in all layouts."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(SFT, folder / "state.pt")
    script = Path(__file__).parent / "ranks.py"
    command = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    both = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    told = [each.communicate(timeout=120)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], told
    return folder


def save_dcp(state: Any, folder: Path) -> Path:
    """Store something by torch.distributed.checkpoint in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        state_dict_saver.save(state, checkpoint_id=folder)
    return folder


def save_bin(state: Any, folder: Path, name: str = "pytorch_model.bin") -> Path:
    """Store something by torch.save."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / name)
    return folder


def save_shards(state: State, folder: Path) -> Path:
    """Store a model as transformers did until its version 4: files of torch.save, and an index."""
    folder.mkdir()
    names = list(state)
    weight_map: dict[str, str] = {}
    for number, some in enumerate((names[:2], names[2:]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if "safetensors" in name}


def assert_merges_alike(tmp_path: Path, sft: Path, state: State = SFT) -> None:
    """Merge an sft, and the same tensors from safetensors, and compare the files; recompute the former."""
    base = write_model(tmp_path / "base", {name: BASE[name] for name in state}, config=CONFIG)
    plain = write_model(tmp_path / "plain", state, config=CONFIG)
    merge_checkpoints(base, plain, tmp_path / "expected", drop=0.5)
    for workers in (1, 3):
        out = tmp_path / f"out-{workers}"
        merge_checkpoints(base, sft, out, drop=0.5, workers=workers)
        assert weights(out) == weights(tmp_path / "expected")
    verify(tmp_path / "out-1")


def held(found: Checkpoint) -> dict[str, bytes]:
    """The bytes of all tensors of an input."""
    with Files({found.role: found}) as files:

        def content(tensor: Held) -> bytes:
            raw = np.empty(tensor.nbytes, np.uint8)
            files.read(found.role, tensor, 0, raw)
            return raw.tobytes()

        return {name: content(tensor) for name, tensor in found.tensors.items()}


def raw(state: State) -> dict[str, bytes]:
    """The bytes of all tensors."""
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


# --- files of torch.save


def test_a_file_of_torch_save_is_merged(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text(json.dumps(CONFIG))
    assert_merges_alike(tmp_path, save_bin(SFT, tmp_path / "sft"))


@pytest.mark.parametrize(
    "save", [save_shards, lambda s, f: save_bin(s, f, "pytorch_model_fsdp.bin")], ids=["index", "fsdp"]
)
def test_so_are_its_other_names(tmp_path: Path, save: Callable[[State, Path], Path]) -> None:
    assert_merges_alike(tmp_path, save(SFT, tmp_path / "sft"))


def test_every_way_to_hold_a_tensor_is_read(tmp_path: Path) -> None:
    whole = torch.randn(10, 6, 4)
    kinds = [torch.float64, torch.float16, torch.bool, torch.int8, torch.uint16, torch.complex64, torch.float8_e4m3fn]
    state = {
        "all": whole, "rows": whole[3:7], "same": whole, "parameter": torch.nn.Parameter(whole[0]),
        "number": torch.tensor(2.0), "none": torch.empty(0, 3), "none of some": whole[10:],
        "one of a column": whole[:, 3:4, :1][4], "a line": whole.transpose(0, 1)[:1, :1],
        **{str(kind): torch.ones(3).to(kind) for kind in kinds},
    }  # fmt: skip
    torch.save(state, tmp_path / "some.bin")
    found = open_pickled(tmp_path / "some.bin", "some.bin")
    content = (tmp_path / "some.bin").read_bytes()
    assert {t.name: t.shape for t in found.tensors} == {name: tuple(t.shape) for name, t in state.items()}
    assert {t.name: content[t.begin : t.begin + t.nbytes] for t in found.tensors} == {
        name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state.items()
    }


def test_a_file_of_more_than_4_gb_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    with torch.serialization.skip_data():  # a hole in the file
        torch.save({"a": torch.empty(4_400_000_000, dtype=torch.uint8), "b": torch.zeros(5)}, path)
    large, small = open_pickled(path, "large.bin").tensors
    assert (large.name, large.nbytes, small.name, small.shape) == ("a", 4_400_000_000, "b", (5,))
    with path.open("r+b") as file:
        file.seek(small.begin)
        file.write(np.arange(5, dtype=np.float32).tobytes())
    assert torch.equal(torch.load(path, mmap=True)["b"], torch.arange(5.0))


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
    monkeypatch.setattr(layout, "SHARD_SIZE", limit)
    save = {"bin": save_shards, "dcp": save_dcp}[form]
    base, sft = save(BASE, tmp_path / "base"), write_model(tmp_path / "sft", SFT)
    plain = write_model(tmp_path / "plain", BASE)
    merge_checkpoints(base, sft, tmp_path / "out", drop=0.5)
    merge_checkpoints(plain, sft, tmp_path / "expected", drop=0.5, max_shard_size=limit)
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


class Evil:
    """What runs a command where it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"mkdir {self.trap}",)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write a zip archive anew, with other contents."""
    with zipfile.ZipFile(path) as before:
        contents = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(path, "w", method) as after:
        for name, content in contents.items():
            after.writestr(name, change(name, content))


def big_endian(name: str, content: bytes) -> bytes:
    return b"big" if name.endswith("byteorder") else content


def repacked(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write the sft by torch.save, and its archive anew, with other contents."""
    torch.save(SFT, path)
    rewritten(path, change, method)


def cut_off(path: Path) -> None:
    torch.save(SFT, path)
    path.write_bytes(path.read_bytes()[:-9])


def of(value: Any) -> Callable[[Path], None]:
    """What saves a value by torch.save."""
    return lambda path: torch.save(value, path)


COMPLEX = torch.ones(3, dtype=torch.complex64)
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (lambda p: torch.save({"a": Evil(p.parent / "trap")}, p), r"holds a posix\.system, .*save_pretrained"),
    "a whole module": (of(torch.nn.Linear(2, 2)), r"holds a torch\.nn\.modules\.linear\.Linear"),
    "sparse": (of({"a": torch.eye(3).to_sparse()}), r"holds a torch\._utils\._rebuild_sparse_tensor"),
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
    "conjugate": (of({"a": COMPLEX.conj()}), "conjugate"),
    "nested": (of({"model": SFT}), "more than a model: a mapping under 'model'"),
    "a number": (of({"a": torch.ones(3), "step": 3}), "holds 'step', of type int and no tensor"),
    "a name that is none": (of({3: torch.ones(3)}), "holds something under 3, which is no name"),
    "a tensor": (of(torch.ones(3)), "no mapping of names to tensors"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "no whole file of torch.save: .*no data.pkl"),
    "a pipe": (os.mkfifo, "cannot be read: it is no plain file"),
    "cut off": (cut_off, "no whole file of torch.save"),
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
        ({"a": "pytorch_model-00001-of-00002.bin"}, r"bin\.index\.json says tensor 'a' lies in .* none of its files"),
    ):
        changed = {"weight_map": index["weight_map"] | change}
        (sft / "pytorch_model.bin.index.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(sft, "sft")


# --- what several ranks stored


@pytest.mark.parametrize("layout", ["flat", "shard0", "shard1", "hf0", "hf1"])
def test_pieces_of_ranks_are_merged_as_the_whole(tmp_path: Path, ranks: Path, layout: str) -> None:
    assert sum(isinstance(each, Pieces) for each in open_checkpoint(ranks / layout, "sft").tensors.values()) >= 4
    assert_merges_alike(tmp_path, ranks / layout)


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp2",
        "accelerate SHARDED_STATE_DICT",
        "accelerate FULL_STATE_DICT",
        "consolidated0",
        "consolidated1",
    ],
)
def test_so_are_those_of_fsdp_and_what_torch_joined(tmp_path: Path, ranks: Path, layout: str) -> None:
    assert_merges_alike(tmp_path, ranks / layout, FLOATS)


def test_what_is_no_model_is_listed(ranks: Path) -> None:
    left = open_checkpoint(ranks / "fsdp2", "sft").left_out
    assert left == (f"optimizer.* ({3 * len(FLOATS) + 12} entries)", "rng_state", "step")


def test_the_folder_of_a_trainer_gives_its_config(tmp_path: Path, ranks: Path) -> None:
    sft = tmp_path / "checkpoint-9"
    shutil.copytree(ranks / "shard0", sft / "pytorch_model_fsdp_0")
    shutil.copytree(ranks / "fsdp2", sft / "optimizer_0")
    (sft / "config.json").write_text(json.dumps(CONFIG | {"told": "by the sft"}))
    (sft / "tokenizer.json").write_text("{}")
    assert_merges_alike(tmp_path, sft)
    assert json.loads((tmp_path / "out-1" / "config.json").read_text())["told"] == "by the sft"
    assert (tmp_path / "out-1" / "tokenizer.json").exists()
    recipe = json.loads((tmp_path / "out-1" / "imm_recipe.json").read_text())
    assert set(recipe["inputs"]["sft"]["files"]) == {
        f"pytorch_model_fsdp_0/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")
    }


@pytest.mark.parametrize("layout", ["shard0", "shard1", "hf0"])
def test_a_base_in_pieces_gives_safetensors(tmp_path: Path, ranks: Path, layout: str) -> None:
    sft = write_model(tmp_path / "sft", BASE)
    plain = write_model(tmp_path / "plain", SFT)
    merge_checkpoints(ranks / layout, sft, tmp_path / "out", drop=0.5)
    merge_checkpoints(plain, sft, tmp_path / "expected", drop=0.5)
    assert raw(read_model(tmp_path / "out")) == raw(read_model(tmp_path / "expected"))
    assert sorted(weights(tmp_path / "out")) == ["model.safetensors"]
    assert b"DCP_SHARDING_INFO" not in (tmp_path / "out" / "model.safetensors").read_bytes()
    verify(tmp_path / "out")


def test_what_wraps_modules_is_taken_from_names(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    wrapped: Any = torch.compile(module, backend="eager")
    save_dcp({"model": torch.nn.DataParallel(wrapped).state_dict()}, tmp_path / "sft")
    assert held(open_checkpoint(tmp_path / "sft", "sft")) == raw(module.state_dict())
    save_dcp({"app": {"model": module.state_dict(), "optim": {"a": torch.ones(3)}}}, tmp_path / "deeper")
    assert held(open_checkpoint(tmp_path / "deeper", "sft")) == raw(module.state_dict())
    save_dcp({**module.state_dict(), "0.state": {1: 2}, "optim": {"a": torch.ones(3)}}, tmp_path / "beside")
    assert held(open_checkpoint(tmp_path / "beside", "sft")) == raw(module.state_dict())
    assert open_checkpoint(tmp_path / "beside", "sft").left_out == ("0.state.1", "optim.*")
    save_dcp({"a.b": torch.ones(2), "a._orig_mod.b": torch.ones(2)}, tmp_path / "twice")
    with pytest.raises(CheckpointError, match=r"holds tensor 'a\.b' twice, as 'a\.b' and as 'a\._orig_mod\.b'"):
        open_checkpoint(tmp_path / "twice", "sft")


def metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def _lose_a_file(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def _cut_a_file(folder: Path) -> None:
    (folder / "__1_0.distcp").write_bytes((folder / "__1_0.distcp").read_bytes()[:-50])


def _change(change: Callable[[Any, Any], None]) -> Callable[[Path], None]:
    """Change what the metadata says, given it and the place of the second piece of the embedding."""

    def changed(folder: Path) -> None:
        found = metadata(folder)
        key = next(k for k in found.storage_data if "embed" in k.fqn and k.offset and k.offset[0])
        change(found, key)
        (folder / ".metadata").write_bytes(pickle.dumps(found))

    return changed


def _chunks(found: Any, key: Any) -> list[Any]:
    chunks: list[Any] = found.state_dict_metadata[key.fqn].chunks
    return chunks


def _code(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(folder / "trap")))


def _no_model(folder: Path) -> None:
    save_dcp({"optimizer": SFT, "step": 3}, folder)


def _of_a_piece(**state: Any) -> Callable[[Path], None]:
    return _change(lambda found, key: vars(found.storage_data[key]).update(state))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no file": (_lose_a_file, r"__1_0\.distcp is missing, or no plain file"),
    "half a file": (_cut_a_file, r"__1_0\.distcp, tensor '.*', is said to be at bytes .*cut off"),
    "a path": (_of_a_piece(relative_path="../x"), r"names '\.\./x'; only plain names"),
    "compression": (_of_a_piece(transform_descriptors=["zstd"]), "is compressed, or changed"),
    "another place": (_of_a_piece(offset=7), r"tensor 'model\.embed_tokens\.weight', is no whole"),
    "no piece": (_change(lambda m, k: _chunks(m, k).pop()), r"\[97, 33\], is stored in 1 pieces that do not fill it"),
    "another size": (
        _change(lambda m, k: setattr(_chunks(m, k)[1], "sizes", torch.Size([47, 33]))),
        r"is BF16 \[48, 33\], and \.metadata says BF16 \[47, 33\]",
    ),
    "another dtype": (
        _change(lambda m, k: setattr(m.state_dict_metadata[k.fqn].properties, "dtype", torch.float16)),
        "is BF16 .* says F16",
    ),
    "nowhere": (_change(lambda m, k: m.storage_data.pop(k)), r"the piece of .*embed.* at \[49, 0\] is nowhere"),
    "an object": (_change(lambda m, _: setattr(m, "version", zipfile.ZipFile)), "holds a zipfile.ZipFile"),
    "code": (_code, r"holds a posix\.system"),
    "no model": (_no_model, "holds no tensor of a model, but optimizer"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_pieces_that_are_not_whole_are_refused(tmp_path: Path, ranks: Path, case: str) -> None:
    damage, match = DAMAGE[case]
    sft = Path(shutil.copytree(ranks / "flat", tmp_path / "sft"))
    damage(sft)
    with pytest.raises(CheckpointError, match=match) as caught:
        merge_checkpoints(write_model(tmp_path / "base", BASE), sft, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (sft / "trap").exists()
    assert not (tmp_path / "out").exists()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_boxes_that_fill_a_tensor_and_no_others_are_joined(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    cuts = [sorted(data.draw(st.sets(st.integers(0, size))) | {0, size}) for size in shape]
    grid: list[tuple[tuple[int, int], ...]] = [()]
    for edges in cuts:
        grid = [(*box, edge) for box in grid for edge in pairwise(edges)]
    boxes = data.draw(st.permutations(grid))
    if data.draw(st.booleans()):
        boxes = [*boxes[1:], *data.draw(st.lists(st.sampled_from(grid), max_size=2))]
    covered = np.zeros(shape, int)
    parts = []
    for box in dict.fromkeys(boxes):
        covered[tuple(slice(*edge) for edge in box)] += 1
    for box in boxes:
        sizes = tuple(high - low for low, high in box)
        parts.append((TensorInfo("a", "F32", sizes, "f", 0, int(np.prod(sizes)) * 4), tuple(low for low, _ in box)))
    if (covered == 1).all():
        assert joined("a", shape, parts, "sft", "x").shape == shape
    else:
        with pytest.raises(CheckpointError, match="do not fill it, or overlap"):
            joined("a", shape, parts, "sft", "x")


def test_a_lost_shard_of_safetensors_is_found(tmp_path: Path, ranks: Path) -> None:
    sft = Path(shutil.copytree(ranks / "hf0", tmp_path / "sft"))
    (sft / "shard-00001-model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pieces that do not fill it, or overlap; was a file of a rank lost"):
        open_checkpoint(sft, "sft")
    second = sft / "shard-00002-model-00001-of-00002.safetensors"
    shutil.copyfile(second, sft / "shard-00003-model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"the pieces of tensor '.*' have .* one place"):
        open_checkpoint(sft, "sft")


# --- all of them


def test_damaged_files_are_refused_or_give_what_is_whole(tmp_path_factory: pytest.TempPathFactory, ranks: Path) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    small = {name: tensor for name, tensor in SFT.items() if tensor.numel() < 300}
    save_bin(small, folder / "bin")
    save_dcp({"model": small, "optimizer": {"a": torch.ones(2)}}, folder / "dcp")
    shutil.copytree(ranks / "shard0", folder / "ranks")
    files = [folder / "bin" / "pytorch_model.bin", *(folder / "dcp").iterdir(), *(folder / "ranks").iterdir()]
    contents = {path: path.read_bytes() for path in files}

    def places(path: Path) -> set[int]:
        """Bytes of tensors, of which no damage shows."""
        found = open_checkpoint(path.parent, "sft")
        tensors = [tensor for file in found.files.values() if file.path == path for tensor in file.tensors]
        return {at for tensor in tensors for at in range(tensor.begin, tensor.begin + tensor.nbytes)}

    hidden = {path: places(path) for path in files}
    whole = {path.parent: held(open_checkpoint(path.parent, "sft")) for path in files}

    @given(data=st.data())
    @settings(max_examples=200, deadline=None, database=None)
    def damage(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(files))
        content = bytearray(contents[path])
        if data.draw(st.integers(0, 5)) == 0:
            content = content[: data.draw(st.integers(0, len(content)))]
        else:
            for _ in range(data.draw(st.integers(1, 3))):
                content[data.draw(st.integers(0, len(content) - 1).filter(lambda at: at not in hidden[path]))] = (
                    data.draw(st.integers(0, 255))
                )
        path.write_bytes(content)
        got = {}
        with suppress(MergeError):
            got = held(open_checkpoint(path.parent, "sft"))
        path.write_bytes(contents[path])
        # Of metadata not everything is written twice, so that a name may be another's.
        for name, expected in whole[path.parent].items():
            assert path.name == ".metadata" or got.get(name, expected) == expected

    damage()


def test_no_byte_of_a_header_can_move_a_tensor(tmp_path: Path) -> None:
    small = {name: SFT[name] for name in ("model.layers.0.w.bias", STEPS)}
    path = save_bin(small, tmp_path / "sft") / "pytorch_model.bin"
    content = path.read_bytes()
    found = open_pickled(path, "a").tensors
    held_at = {at for tensor in found for at in range(tensor.begin, tensor.begin + tensor.nbytes)}
    wrong = []
    for at in sorted(set(range(len(content))) - held_at):
        for byte in (content[at] ^ 1, content[at] ^ 8):
            path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            with suppress(CheckpointError):
                if open_pickled(path, "a").tensors != found:
                    wrong.append((at, byte))
    assert wrong == []


@pytest.mark.parametrize("form", ["bin", "dcp"])
def test_a_file_that_changes_meanwhile_is_found(tmp_path: Path, form: str) -> None:
    base = write_model(tmp_path / "base", BASE)
    sft = {"bin": save_shards, "dcp": save_dcp}[form](SFT, tmp_path / "sft")
    watched = "pytorch_model.bin.index.json" if form == "bin" else ".metadata"
    with pytest.raises(ChangedError, match=watched):
        merge_checkpoints(base, sft, tmp_path / "out", progress=lambda *_: os.utime(sft / watched, ns=(1, 1)))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_merge_of_other_files_is_not_verified(tmp_path: Path, name: str) -> None:
    base = write_model(tmp_path / "base", BASE)
    sft = save_dcp({"model": SFT}, tmp_path / "sft")
    merge_checkpoints(base, sft, tmp_path / "out")
    again = save_dcp({"model": SFT}, tmp_path / "again")  # it has another id
    shutil.copyfile(again / name, sft / name)
    if name == "__0_0.distcp":
        content = bytearray((sft / name).read_bytes())
        content[6000] ^= 1  # of the embedding
        (sft / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"not what was merged: its {name} has changed"):
        verify(tmp_path / "out")


def test_no_torch_is_needed(tmp_path: Path, ranks: Path) -> None:
    base = save_bin(BASE, tmp_path / "base")
    code = (
        "import sys; from mergekit_imm import merge_checkpoints\n"
        f"merge_checkpoints({str(base)!r}, {str(ranks / 'shard0')!r}, {str(tmp_path / 'out')!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["zero_to_fp32.py", "latest", "rng_state_0.pth"],
         r"DeepSpeed checkpoint; .*`cd '\S+/a b' && python zero_to_fp32\.py \. OUT --safe_serialization`"),
        (["global_step5/mp_rank_00_model_states.pt"], "a DeepSpeed checkpoint"),
        (["mp_rank_00_model_states.pt"], "a part of a DeepSpeed checkpoint.*the folder that it is in"),
        (["model_world_size_2_rank_0.pt", "optim_world_size_2_rank_0.pt"],
         r"verl stored; .*`python -m verl\.model_merger merge --backend fsdp --local_dir '\S+/a b' --target_dir OUT`"),
        (["pytorch_model_fsdp_0_rank0.bin"], "each rank of FSDP stored.*SHARDED_STATE_DICT"),
        ([".metadata", "common.pt"], "a Megatron checkpoint.*Megatron Bridge"),
        (["iter_0000005/x", "latest_checkpointed_iteration.txt"], "a Megatron checkpoint"),
    ],
)  # fmt: skip
def test_other_forms_are_refused_with_what_to_run(tmp_path: Path, names: list[str], match: str) -> None:
    sft = tmp_path / "a b"
    for name in names:
        (sft / name).parent.mkdir(parents=True, exist_ok=True)
        (sft / name).write_text("x")
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(sft, "sft")
