"""Files that are damaged, missing, or changed during the merge."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import write_model
from mergekit_imm import CheckpointError, MergeError, merge_checkpoints, verify
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.checkpoint.torch_file import open_torch_file
from mergekit_imm.errors import ChangedError
from other_forms import BASE, SFT, STEPS, Evil, held, save_bin, save_dcp, save_shards


def metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def _leave_a_pointer(folder: Path) -> None:
    (folder / "__1_0.distcp").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def _lose_a_file(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def _cut_a_file(folder: Path) -> None:
    (folder / "__1_0.distcp").write_bytes((folder / "__1_0.distcp").read_bytes()[:-50])


def _change(change: Callable[[Any, Any], None]) -> Callable[[Path], None]:
    """Change the metadata; the change gets it and the index of the embedding's second piece."""

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
    "a pointer": (_leave_a_pointer, r"__1_0\.distcp is a Git LFS pointer, not the file itself; run `git lfs pull` in"),
    "no file": (_lose_a_file, r"__1_0\.distcp is missing or not a plain file"),
    "half a file": (_cut_a_file, r"__1_0\.distcp, tensor '.*', should begin at byte .*cut off"),
    "a path": (_of_a_piece(relative_path="../x"), r"names '\.\./x'; only plain names"),
    "compression": (_of_a_piece(transform_descriptors=["zstd"]), "was compressed or transformed"),
    "another place": (_of_a_piece(offset=7), r"tensor 'model\.embed_tokens\.weight', is no whole"),
    "no piece": (_change(lambda m, k: _chunks(m, k).pop()), r"\[97, 33\], is stored in 1 pieces that do not fill it"),
    "another size": (
        _change(lambda m, k: setattr(_chunks(m, k)[1], "sizes", torch.Size([47, 33]))),
        r"is BF16 \[48, 33\], but \.metadata says BF16 \[47, 33\]",
    ),
    "another dtype": (
        _change(lambda m, k: setattr(m.state_dict_metadata[k.fqn].properties, "dtype", torch.float16)),
        "is BF16 .* says F16",
    ),
    "nowhere": (_change(lambda m, k: m.storage_data.pop(k)), r"the piece of .*embed.* at \[49, 0\] is in no file"),
    "an object": (_change(lambda m, _: setattr(m, "version", zipfile.ZipFile)), "holds a zipfile.ZipFile"),
    "code": (_code, r"holds a posix\.system"),
    "no model": (_no_model, "holds no tensors of a model, only optimizer"),
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


def test_a_lost_shard_of_safetensors_is_found(tmp_path: Path, ranks: Path) -> None:
    sft = Path(shutil.copytree(ranks / "hf0", tmp_path / "sft"))
    (sft / "shard-00001-model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pieces that do not fill it or overlap; is the file of a rank missing"):
        open_checkpoint(sft, "sft")
    second = sft / "shard-00002-model-00001-of-00002.safetensors"
    shutil.copyfile(second, sft / "shard-00003-model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"the pieces of tensor '.*' .* begin at one place"):
        open_checkpoint(sft, "sft")


def test_damaged_files_are_refused_or_give_what_is_whole(tmp_path_factory: pytest.TempPathFactory, ranks: Path) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    small = {name: tensor for name, tensor in SFT.items() if tensor.numel() < 300}
    save_bin(small, folder / "bin")
    save_dcp({"model": small, "optimizer": {"a": torch.ones(2)}}, folder / "dcp")
    shutil.copytree(ranks / "shard0", folder / "ranks")
    files = [folder / "bin" / "pytorch_model.bin", *(folder / "dcp").iterdir(), *(folder / "ranks").iterdir()]
    contents = {path: path.read_bytes() for path in files}

    def places(path: Path) -> set[int]:
        """Bytes of tensors, where damage does not show."""
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
        # Metadata is not fully redundant: a damaged name may be another valid one.
        for name, expected in whole[path.parent].items():
            assert path.name == ".metadata" or got.get(name, expected) == expected

    damage()


def test_no_byte_of_a_header_can_move_a_tensor(tmp_path: Path) -> None:
    small = {name: SFT[name] for name in ("model.layers.0.w.bias", STEPS)}
    path = save_bin(small, tmp_path / "sft") / "pytorch_model.bin"
    content = path.read_bytes()
    found = open_torch_file(path, "a").tensors
    held_at = {at for tensor in found for at in range(tensor.begin, tensor.begin + tensor.nbytes)}
    wrong = []
    for at in sorted(set(range(len(content))) - held_at):
        for byte in (content[at] ^ 1, content[at] ^ 8):
            path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            with suppress(CheckpointError):
                if open_torch_file(path, "a").tensors != found:
                    wrong.append((at, byte))
    assert wrong == []


def test_no_byte_can_be_lost_or_added(tmp_path: Path) -> None:
    path = save_bin({"a": SFT["model.layers.0.w.bias"]}, tmp_path / "sft") / "pytorch_model.bin"
    content = path.read_bytes()
    for at in range(0, len(content), 11):
        for changed in (content[:at] + content[at + 1 :], content[:at] + b"P" + content[at:]):
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                open_torch_file(path, "a")


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
    again = save_dcp({"model": SFT}, tmp_path / "again")  # with another id
    shutil.copyfile(again / name, sft / name)
    if name == "__0_0.distcp":
        content = bytearray((sft / name).read_bytes())
        content[6000] ^= 1  # in the embedding
        (sft / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"not what was merged: its {name} has changed"):
        verify(tmp_path / "out")
