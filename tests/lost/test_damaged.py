"""Damaged files end in a result or a one-line error."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays

from checkpoints import random_state, read_model, write_model
from commands import CONFIG, subprocess_of
from mergekit_imm import CheckpointError, MergeError, merge_checkpoints
from mergekit_imm.common.json_files import DEPTH, parse_json
from thorough import examples

from .test_cut_off import run


def test_damaged_inputs_end_in_a_result_or_one_line(tmp_path: Path) -> None:
    """A hundred here, or a few; more with `python -m lost.damage`."""
    result = run("damage", tmp_path, "--count", examples(400), "--seed", 0)
    assert result["tried"] >= examples(400)
    assert {"merged", "CheckpointError", "MismatchError", "OutputError"} <= set(result["endings"])


@pytest.mark.thorough
def test_the_program_that_damages_finds_what_is_wrong(tmp_path: Path) -> None:
    """It fails if the merge accepts any JSON."""
    code = (
        "import json; from pathlib import Path; from lost import damage\n"
        "from mergekit_imm.checkpoint import folder\n"
        "folder.parse_json = json.loads\n"
        f"damage.main(Path({str(tmp_path)!r}), 3000, 0)"
    )
    ended = subprocess_of(code=code, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert ended.status == 1
    assert "Error" in ended.err


@pytest.mark.parametrize("depth", [DEPTH + 1, 3000, 200_000])
@pytest.mark.parametrize("text", ["[{}]", '{{"a": {}}}'])
def test_endless_nesting_is_refused(tmp_path: Path, depth: int, text: str) -> None:
    before, after = text.replace("{{", "{").replace("}}", "}").split("{}")
    content = before * depth + "1" + after * depth
    with pytest.raises(ValueError, match="nested"):
        parse_json(content.encode())
    assert parse_json((before * DEPTH + "1" + after * DEPTH).encode())
    for role in ("base", "sft"):
        write_model(tmp_path / role, random_state({"a": (4,)}))
    (tmp_path / "sft" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="nested"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")


def test_json_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(rb'{"a": "\ud800"}')
    assert parse_json(rb'{"a": "\ud83d\ude00"}') == {"a": "😀"}


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "imm_recipe.json", "tokenizer.json"]
)
def test_a_pipe_in_the_place_of_a_file_is_no_trap(tmp_path: Path, name: str) -> None:
    """Opening it would block forever."""
    for role in ("base", "sft", "start"):
        write_model(tmp_path / role, random_state({"a": (4,)}), config=CONFIG)
    (tmp_path / "start" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "start" / name)
    ended = subprocess_of("merge", "base", "sft", "--start", "start", "-o", "out", cwd=tmp_path)
    assert ended.status == 1
    assert "plain file" in ended.error


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for role in ("base", "sft"):
        write_model(tmp_path / role, random_state({"a": (4,)}))
    try:
        (tmp_path / "sft" / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    except OSError:
        pytest.skip("this filesystem takes only UTF-8")
    ended = subprocess_of("merge", "base", "sft", "-o", "out", cwd=tmp_path)
    assert r"'caf\udce9.txt', a name that is not valid UTF-8; rename or remove it" in ended.error


NAMES = [
    "a\nb", "tab\there", "ü.weight", "模型.层.0.权重", "\u202eevil", "\u2028line", "'quote\"", "-o", "{alpha}", " ",
    "..", "/etc/passwd", "../up", "x" * 2000, "🙂", "\x07bell", "\x00nul",
]  # fmt: skip


def test_names_of_tensors_may_be_anything(tmp_path: Path) -> None:
    for seed, role in enumerate(("base", "sft")):
        write_model(tmp_path / role, random_state(dict.fromkeys(NAMES, (4, 4)), seed=seed))
    ended = subprocess_of(
        "merge", "base", "sft", "-o", "out", "--drop", "0", "--max-shard-size", "100B", "--verify", cwd=tmp_path
    )
    assert ended.status == 0
    merged = read_model(tmp_path / "out")
    assert set(merged) == set(NAMES)
    base, sft = read_model(tmp_path / "base"), read_model(tmp_path / "sft")
    for name in NAMES:
        mean = (base[name].float() + 0.5 * (sft[name].float() - base[name].float())).to(torch.bfloat16)
        assert torch.equal(merged[name], mean)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "sft"]
    sft["\u202eevil"][0] = torch.nan
    write_model(tmp_path / "sft", sft)
    ended = subprocess_of("merge", "base", "sft", "-o", "again", cwd=tmp_path)
    assert r"tensor '\u202eevil' of sft" in ended.error
    assert ended.error.isprintable()


def test_tens_of_thousands_of_tensors(tmp_path: Path) -> None:
    state = {f"t{i}": np.full(2, i % 100, np.float32) for i in range(20_000)}
    for role in ("base", "sft"):
        (tmp_path / role).mkdir()
        save_arrays(state, tmp_path / role / "model.safetensors")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    merged = load_arrays(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == state.keys()
    assert all((merged[name] == state[name]).all() for name in state)


# --- nothing in a checkpoint is executed


class Malicious:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "optimizer.pt", ".metadata"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a model"])
def test_a_pickle_is_not_opened(tmp_path: Path, name: str, beside: bool) -> None:
    for role in ("base", "sft"):
        write_model(tmp_path / role, random_state({"a": (4,)}), config=CONFIG)
    if not beside:
        (tmp_path / "sft" / "model.safetensors").unlink()
    if name == ".metadata":
        (tmp_path / "sft" / name).write_bytes(pickle.dumps(Malicious(tmp_path / "trap")))
        pickle.loads((tmp_path / "sft" / name).read_bytes())  # the trap works
    else:
        torch.save({"a": Malicious(tmp_path / "trap")}, tmp_path / "sft" / name)
        torch.load(tmp_path / "sft" / name, weights_only=False)
    (tmp_path / "trap").rmdir()
    if beside:
        leave_out = [name] if name == "model.pt" else []  # it could be weights of the model
        for _ in leave_out:
            with pytest.raises(CheckpointError, match=r"holds a posix\.mkdir, .*; if it is not part of sft"):
                merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", leave_out=leave_out)
        assert not (tmp_path / "out" / name).exists()
    else:
        with pytest.raises(MergeError, match=r"sft .* holds |sft/\S+ holds a posix\.mkdir, "):
            merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert not (tmp_path / "trap").exists()


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    config = CONFIG | {"auto_map": {"AutoConfig": "modeling_x.XConfig", "AutoModel": "modeling_x.X"}}
    trap = f"from pathlib import Path; Path({str(tmp_path / 'trap')!r}).mkdir()"
    side = {"modeling_x.py": trap, "__init__.py": trap, "numpy.py": trap, "setup.py": trap, "sub/conftest.py": trap}
    for role in ("base", "sft"):
        write_model(tmp_path / role, random_state({"a": (4,)}), config=config, side=side)
    for options, copied in (([], []), (["--copy-code"], sorted(side))):
        ended = subprocess_of(
            "merge",
            ".",
            "../sft",
            "-o",
            "../out",
            "--overwrite",
            *options,
            cwd=tmp_path / "base",
            code="import sys; sys.path.remove('')\nfrom mergekit_imm.cli.main import main; main()",
        )
        assert ended.status == 0, ended.err
        assert not (tmp_path / "trap").exists()
        out = tmp_path / "out"
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*.py")) == copied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == config["auto_map"]
    assert "modeling_x" not in sys.modules
