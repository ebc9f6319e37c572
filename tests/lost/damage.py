"""Merge checkpoints that hypothesis has damaged, and check how each merge ends.

    python -m lost.damage FOLDER [--count N] [--seed N]

Each case is a pair of small models (sometimes with a start, an importance file, an unfinished merge, an adapter or FP8
weights as sft, or a merge to verify) with some files damaged: bytes, lengths, JSON. The merge must end in a complete
folder or a one-line MergeError, in a few seconds, within a gigabyte, with unchanged inputs and no file elsewhere.
Prints JSON: how many cases, how they ended.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mergekit_imm import merge_checkpoints, verify
from mergekit_imm.errors import MergeError

from .driver import Files, files_of

SECONDS, MEMORY = 600, 1 << 30  # limits of one case; more seconds mean that it hangs
SHAPES = {
    "model.embed_tokens.weight": (16, 4),
    "model.layers.0.w.weight": (8, 8),
    "model.layers.1.w.weight": (8, 8),
    "norm": (8,),
}
CONFIG = {
    "architectures": ["Tiny"],
    "model_type": "tiny",
    "dtype": "float16",
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "text_config": {"dtype": "float16"},
}
EVIL_TEXT = [
    "", "../../etc/passwd", "/etc/passwd", "..", ".", "model.safetensors", "a/b", "\n", "\x00", "nul", "ä\u2028🙂",
    "model.layers.0.w.weight", "__metadata__", "F16", "BF16", "F64", "I64", "F4", "U8", "x" * 3000,
]  # fmt: skip
EVIL: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 1 << 31, 1 << 63, 1 << 64, 10**400, 1e308, -0.5, float("nan"), float("inf"), [], {},
    [0], [[]], {"": {}}, [1 << 62, 0], [1 << 40], [0, 1 << 50], [5, 3], *EVIL_TEXT,
]  # fmt: skip
EVIL_BYTES = [
    b"", b"{", b"[" * 100_000, b'{"a":' * 5000, b"null", b"[]", b"\xff\xfe", b"{}", b'"\\ud800"', b"\x00" * 64,
    b'{"a": 1, "a": 2}', b'{"__metadata__": {}}', b"NaN", b"-", b"1e999", b'{"weight_map": {"a": "\\ud800"}}',
]  # fmt: skip
STRAYS = [
    "sft/model.safetensors.index.json",
    "base/model.safetensors",
    "sft/x.bin",
    "out.replacing",
    "sft/adapter_config.json",
    "base/config.json/x",
]
FORMS = ["plain", "plain", "start", "importance", "adapter", "fp8", "unfinished", "verified"]


def write_models(folder: Path) -> Files:
    """Write the intact files of all forms."""
    for seed, role in enumerate(("base", "sft")):
        draw = np.random.default_rng(seed)
        state: dict[str, Any] = {n: draw.normal(0, 0.02, shape).astype(np.float16) for n, shape in SHAPES.items()}
        state["steps"] = np.arange(2)
        (folder / role).mkdir()
        (folder / role / "config.json").write_text(json.dumps(CONFIG))
        (folder / role / "tokenizer.json").write_text('{"a": 1}')
        if role == "sft":
            save_file(state, folder / role / "model.safetensors", metadata={"format": "pt"})
            continue
        names = list(state)
        weight_map: dict[str, str] = {}
        for number, part in ((1, names[:2]), (2, names[2:])):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({name: state[name] for name in part}, folder / role / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "importance.json").write_text(json.dumps({"layers": {"model.layers.0": 1, "model.layers.1": 2.5}}))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    lora = {
        f"base_model.model.model.layers.0.w.lora_{x}.weight": np.ones(s, np.float16)
        for x, s in (("A", (2, 8)), ("B", (8, 2)))
    }
    save_file(lora, folder / "adapter" / "adapter_model.safetensors")
    _write_fp8(folder / "fp8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        merge_checkpoints("base", "sft", "start", max_shard_size="1GB")
        merge_checkpoints("base", "sft", "verified", start="start")
        with contextlib.suppress(KeyboardInterrupt):
            merge_checkpoints("base", "sft", "out", progress=_interrupt)
    finally:
        os.chdir(before)
    return files_of(folder)


def _write_fp8(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    state = {n: torch.ones(s, dtype=torch.float16 if len(s) == 1 else torch.float8_e4m3fn) for n, s in SHAPES.items()}
    scales = {f"{n}_scale_inv": torch.ones(s[0] // 2, s[1] // 4) for n, s in SHAPES.items() if len(s) == 2}
    scales["model.layers.1.w.weight_scale_inv"] = torch.ones(())
    save_file({**state, **scales, "steps": torch.arange(2)}, folder / "model.safetensors")
    said = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": said}))


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


# --- damage

Draw = Any


def damaged_json(draw: Draw, content: bytes) -> bytes:
    """Change values or keys of a JSON document, or write it with a duplicate key."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return damaged_bytes(draw, content)
    places = list(_places(document))
    if not places:
        return damaged_bytes(draw, content)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["evil", "other", "rename", "delete", "copy"]))
        if key not in (container if isinstance(container, dict) else range(len(container))):
            continue
        if change == "evil":
            container[key] = copy.deepcopy(draw(st.sampled_from(EVIL)))
        elif change == "other":
            other, place = draw(st.sampled_from(places))
            if place in (other if isinstance(other, dict) else range(len(other))):
                container[key] = copy.deepcopy(other[place])
        elif change == "delete" or not isinstance(container, dict):
            del container[key]
        else:
            name = draw(st.sampled_from(EVIL_TEXT) | st.text(max_size=8))
            container[name] = copy.deepcopy(container[key])
            if change == "rename" and name != key:
                del container[key]
    written = json.dumps(document, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:  # a duplicate key
        keys = re.findall(rb'"[^"\\]+":', written)
        if len(keys) > 1:
            written = written.replace(draw(st.sampled_from(keys)), draw(st.sampled_from(keys)), 1)
    return written


def _places(document: Any) -> Any:
    if isinstance(document, dict | list):
        for key in list(document) if isinstance(document, dict) else range(len(document)):
            yield document, key
            yield from _places(document[key])


def damaged_bytes(draw: Draw, content: bytes) -> bytes:
    """Cut, lengthen, overwrite or replace bytes."""
    kind: str = draw(st.sampled_from(["cut", "add", "flip", "overwrite", "evil", "insert"]))
    at: int = draw(st.integers(0, len(content)))
    if kind == "cut":
        return content[:at]
    if kind == "add":
        return content + bytes(draw(st.binary(min_size=1, max_size=64)))
    if kind == "flip" and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    if kind == "evil":
        return bytes(draw(st.sampled_from(EVIL_BYTES)))
    piece: bytes = draw(st.binary(max_size=32))
    return content[:at] + piece + content[at + (len(piece) if kind == "overwrite" else 0) :]


def damaged_file(draw: Draw, content: bytes) -> bytes:
    """Damage a safetensors file: its header, the header's length, the data."""
    if draw(st.integers(0, 2)) == 0:
        return damaged_bytes(draw, content)
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    header = (damaged_json if draw(st.integers(0, 3)) else damaged_bytes)(draw, header)
    length = len(header)
    if draw(st.integers(0, 4)) == 0:
        length = draw(st.sampled_from([0, 1, 7, length - 1, length + 1, 1 << 20, 100_000_001, 1 << 63, (1 << 64) - 1]))
    if draw(st.integers(0, 4)) == 0:
        body = damaged_bytes(draw, body)
    return (length % (1 << 64)).to_bytes(8, "little") + header + body


class Case:
    """A form of merge, and its damaged input files."""

    def __init__(self, form: str, files: Files, whole: Files) -> None:
        self.form, self.files, self.whole = form, files, whole

    def __repr__(self) -> str:
        changed = {path: it[:300] for path, it in self.files.items() if it != self.whole.get(path)}
        return f"{self.form}, changed {changed}, without {sorted({*self.whole} - {*self.files})}"


def damaged(draw: Draw, files: Files) -> Case:
    """Draw a case."""
    form = draw(st.sampled_from(FORMS))
    used = {
        path: content
        for path, content in files.items()
        if path.split("/")[0] in ("base", "sft")
        or path.split("/")[0].split(".")[0] == form
        or (form == "unfinished" and path.startswith("out"))
        or (form == "verified" and path.startswith("start"))
    }
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(sorted(used)))
        if draw(st.integers(0, 19)) == 0:
            del used[path]
            if not used:
                break
        elif path.endswith(".safetensors"):
            used[path] = damaged_file(draw, used[path])
        elif path.endswith(".json"):
            used[path] = (damaged_json if draw(st.integers(0, 3)) else damaged_bytes)(draw, used[path])
        else:
            used[path] = damaged_bytes(draw, used[path])
        if draw(st.integers(0, 29)) == 0:  # a file that should not be there
            stray = draw(st.sampled_from(STRAYS))
            if stray not in used and not any(stray.startswith(f"{each}/") for each in used):
                used[stray] = draw(st.sampled_from(EVIL_BYTES))
    return Case(form, used, files)


# --- how a merge ends


def ending(form: str, files: Files, folder: Path) -> str:
    """Merge one case in an empty folder and return how it ended. Raises AssertionError for a forbidden end."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    os.chdir(folder)
    options: dict[str, Any] = {"workers": 1}
    if form == "start":
        options |= {"start": "start"}
    elif form == "importance":
        options |= {"importance": "importance.json"}
    elif form == "fp8":
        options |= {"dequantize": True}
    report = None
    try:
        if form == "verified":
            verify("verified", workers=1)
        else:
            report = merge_checkpoints("base", form if form in ("adapter", "fp8") else "sft", "out", **options)
    except MergeError as error:
        message = str(error)
        assert message.isprintable(), f"not one line: {message!r}"
        assert len(message) < 2000, f"{len(message)} characters"
        kind = type(error).__name__
        assert "out" not in _top(folder), f"refused, and there is an out: {message}"
    else:
        kind = "verified"
    if report is not None:
        kind = report.status
        written: set[str] = set()
        for shard in (folder / "out").glob("*.safetensors"):
            with safe_open(shard, framework="numpy") as file:
                written |= set(file.keys())
        assert len(written) == sum(report.tensors.values())
        assert "out.partial" not in _top(folder)
    inputs = {path: content for path, content in files.items() if not path.startswith("out")}
    found = {p: content for p, content in files_of(folder).items() if not p.startswith(("out/", "out.partial/"))}
    found.pop("out.replacing", None)
    assert found == inputs, f"changed, or new: {sorted({*found} ^ {*inputs})}"
    return kind


def _top(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def main(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Try `count` cases."""
    folder.mkdir(parents=True, exist_ok=True)
    models = Path(tempfile.mkdtemp(dir=folder))
    files = write_models(models)
    shutil.rmtree(models)
    os.fsync = os.fdatasync = lambda _: None  # type: ignore[assignment]  # nothing here must survive a crash
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    endings: Counter[str] = Counter()
    home = Path.cwd()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(st.composite(lambda draw: damaged(draw, files))())
    def each(case: Case) -> None:
        place = Path(tempfile.mkdtemp(dir=folder))
        signal.alarm(SECONDS)
        try:
            endings[ending(case.form, case.files, place)] += 1
            assert threading.active_count() == 1
        finally:
            signal.alarm(0)
            os.chdir(home)
            shutil.rmtree(place)

    each()
    return {"tried": sum(endings.values()), "endings": dict(sorted(endings.items())), "seed": seed}


def _too_long(*_: object) -> None:
    raise AssertionError(f"a merge took more than {SECONDS} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(main(given.folder.resolve(), given.count, given.seed)), file=sys.stdout)
