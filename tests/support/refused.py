"""Refusals: one line with what was found, where, and a cure; nothing is written."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import random_state, read_model, write_model
from mergekit_imm import MergeReport, merge_checkpoints
from mergekit_imm.errors import MergeError
from mergekit_imm.numerics.dtypes import DTYPE_BITS

UP0, UP1 = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
NORM, HEAD, STEPS = "model.norm.weight", "lm_head.weight", "model.steps"
SHAPES = {"model.embed_tokens.weight": (32, 8), UP0: (8, 8), UP1: (8, 8), NORM: (8,), HEAD: (32, 8)}
CONFIG = {
    "architectures": ["TinyForCausalLM"],
    "dtype": "bfloat16",
    "model_type": "tiny",
    "tie_word_embeddings": False,
    "vocab_size": 32,
}
SIDE = {"tokenizer.json": '{"a": 1}\n', "templates/chat.jinja": "{{ x }}"}
MODEL, INDEX, PARTIAL = "model.safetensors", "model.safetensors.index.json", "out.partial"


BITS = {
    torch.bfloat16: (torch.int16, 0x7FC0, [0x7F80, 0xFF80, 0x7F81, 0xFFC0, 0xFFFF]),
    torch.float16: (torch.int16, 0x7E00, [0x7C00, 0xFC00, 0x7C01, 0xFE00, 0xFFFF]),
    torch.float32: (torch.int32, 0x7FC00000, [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF]),
    torch.float64: (torch.int64, 0x7FF8 << 48, [0x7FF0 << 48, 0xFFF0 << 48, (0x7FF0 << 48) + 1, (1 << 64) - 1]),
}


def everything(folder: Path, *, times: bool = True) -> dict[str, object]:
    """Snapshot a folder: contents, links and modification times."""
    found: dict[str, object] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path)] = (content, path.lstat().st_mtime_ns if times else 0)
    return found


@dataclass
class Models:
    """Two small models that can be merged, and an output path."""

    folder: Path
    base: Path
    sft: Path
    out: Path

    def merge(self, **options: Any) -> MergeReport:
        places = {role: options.pop(role, getattr(self, role)) for role in ("base", "sft", "out")}
        report: MergeReport = merge_checkpoints(*places.values(), **{"workers": 1, **options})
        return report

    def refused(self, error: type[MergeError], match: str, *, streaming: bool = False, **options: Any) -> str:
        """Check that a merge is refused and changes nothing; return the message as commands print it.

        A dry run must raise the same message, unless only `streaming` the tensors can find the fault.
        """
        before = everything(self.folder, times=not streaming)
        messages: set[str] = set()
        for dry_run in [False] if streaming else [True, False]:
            with pytest.raises(error) as caught:
                self.merge(dry_run=dry_run, **options)
            assert re.search(match, caught.value.args[0]), caught.value.args[0]
            assert error in (type(caught.value), MergeError)
            assert everything(self.folder, times=not streaming) == before
            messages.add(caught.value.args[0])
            assert not re.search("--(keep|take|rename|no-drop|vocab|iteration|restart|overwrite)", str(caught.value))
        assert len(messages) == 1
        assert all(message.isprintable() for message in messages)
        return messages.pop()

    def change(self, role: str, changes: Mapping[str, torch.Tensor | None], config: Mapping[str, Any] = CONFIG) -> None:
        """Rewrite a model with changed tensors; None removes one."""
        state = {**random_state(SHAPES, seed=len(role)), **changes}
        write_model(getattr(self, role), {n: t for n, t in state.items() if t is not None}, config=config)

    def merged(self) -> dict[str, torch.Tensor]:
        return read_model(self.out)


def write_models(folder: Path) -> Models:
    """Write the two models into a folder."""
    made = Models(folder, folder / "base", folder / "sft", folder / "out")
    for role in ("base", "sft"):
        write_model(getattr(made, role), random_state(SHAPES, seed=len(role)), config=CONFIG, side=SIDE)
    return made


def write_file(path: Path, header: object, data: bytes | None = None, *, length: int | None = None) -> Path:
    """Write a safetensors file with a given header: bytes, or an object to encode as JSON."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = b"" if data is None else data
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + body)
    return path


def write_zeros(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> Path:
    """Write a safetensors file of zeros: name -> (dtype in the header, shape)."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return write_file(path, header, bytes(end))


def shown_options(message: str) -> list[dict[str, list[str]]]:
    """Parse the options that a message shows, as a shell would."""
    found: list[dict[str, list[str]]] = []
    for match in re.finditer(r"""--(keep|take) (?=['"^])""", message):
        lexer = shlex.shlex(message[match.end() :], posix=True)
        lexer.whitespace_split = True
        lexer.commenters = ""
        found.append({match[1]: [next(lexer).rstrip(";,")]})
    return found


def sharded(models: Models) -> dict[str, Any]:
    """Shard the sft; return its index."""
    (models.sft / MODEL).unlink()
    names = list(SHAPES)
    write_model(models.sft, random_state(SHAPES, seed=3), shards=[names[:2], names[2:]], config=CONFIG)
    index: dict[str, Any] = json.loads((models.sft / INDEX).read_text())
    return index


def linked(models: Models, kind: str) -> tuple[Path | str, Path]:
    """Move sft into out; return a path to each."""
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
        case "input through a link":
            link.symlink_to(models.out / "deep")
            return link / "sft", models.out
        case "output through a link":
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


def interrupt(models: Models, **options: Any) -> None:
    """Start a merge and interrupt it."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.merge(progress=stop, **options)


def from_bits(bits: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    whole = BITS[dtype][0]
    width = torch.iinfo(whole).bits
    return torch.tensor([b - (1 << width) if b >> (width - 1) else b for b in bits], dtype=whole).view(dtype)
