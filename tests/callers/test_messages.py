"""Messages name options for command users, parameters for Python callers."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from pathlib import Path

import pytest

import mergekit_imm
from commands import subprocess_of, write_pair
from mergekit_imm import (
    ArgumentError,
    MergeError,
    MismatchError,
    iter_merged,
    merge_checkpoints,
    verify,
)
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.cli.verify import verify_command
from mergekit_imm.common.messages import for_caller, speaking_of_options
from mergekit_imm.model.tensor_names import ready_option
from mergekit_imm.plan.describe import check

SOURCES = Path(mergekit_imm.__file__).parent


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("use --restart, or --overwrite.", "use restart=True, or overwrite=True."),
        ("--dtype float32 is safe", 'dtype="float32" is safe'),
        ("(--vocab base)", '(vocab="base")'),
        ("--vocab needs rows; a smaller --max-shard-size", "vocab needs rows; a smaller max_shard_size"),
        ("with --iteration N (from 0)", "with iteration=N (from 0)"),
        ("--max-length 512", "max_length=512"),
        ("--rename REGEX=REPLACEMENT", 'rename=["REGEX=REPLACEMENT"]'),
        ("--sft, or the old one", "sft, or the old one"),
        (
            "`imm-merge MODEL lora --alpha 0 -o OUT`, or --start OUT",
            "`imm-merge MODEL lora --alpha 0 -o OUT`, or start=OUT",
        ),
        ("`zero_to_fp32.py . OUT --safe_serialization` --local-dir DIR", None),
        ("a name such as my--keep or --keeper", None),
    ],
)
def test_each_kind_of_option(written: str, read: str | None) -> None:
    assert for_caller(written) == (written if read is None else read)
    with speaking_of_options():
        assert for_caller(written) == written
    assert str(MismatchError(written)) == for_caller(written)


@pytest.mark.parametrize("name", ["lm_head.weight", "it's", 'a"b', 'it\'s "both"', "back\\slash", "ends\\", "a b -- c"])
def test_a_pattern_can_be_pasted_into_python(name: str) -> None:
    shown = str(MismatchError(f"give {ready_option('--take', name)}, or not"))
    found = re.fullmatch(r"give take=(\[.*\]), or not", shown)
    assert found is not None
    (pattern,) = ast.literal_eval(found[1])
    assert re.search(pattern, name)
    assert not re.search(pattern, name + "x")


def test_an_error_keeps_what_was_written() -> None:
    error = ArgumentError("leave out --restart")
    again = pickle.loads(pickle.dumps(error))  # as sent between ranks
    assert (str(again), again.args) == ("leave out restart=True", ("leave out --restart",))
    with speaking_of_options():
        assert str(again) == "leave out --restart"


def test_every_option_that_a_message_names_is_known() -> None:
    """Messages of commands themselves always name options."""
    ours = {option for each in (merge_command, verify_command) for p in each.params for option in p.opts}
    for path in SOURCES.rglob("*.py"):
        if path.parent.name == "cli" or path.stem == "torchrun":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", inspect.cleandoc(node.value))) & ours
                unknown = {each for each in named if for_caller(each) == each} - {"--check", "--json", "--ranks"}
                assert not unknown, path


@pytest.fixture
def surplus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, and an sft with an extra tensor."""
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(write_pair(tmp_path))
    file = tmp_path / "sft" / "model.safetensors"
    save_file({**load_file(file), "score.weight": torch.ones(3)}, file)
    return tmp_path


def test_python_callers_are_told_of_parameters(surplus: Path) -> None:
    ready = r'let them through: take=[r"^score\.weight$"]'
    for call in (lambda: merge_checkpoints("base", "sft", "out"), lambda: iter_merged("base", "sft")):
        with pytest.raises(MergeError) as caught:
            call()
        assert ready in str(caught.value)
    assert ready in check("base", "sft").problems[0]
    assert merge_checkpoints("base", "sft", "out", take=[r"^score\.weight$"]).status == "merged"
    with pytest.raises(MergeError, match=r"give another, or overwrite=True"):
        merge_checkpoints("base", "sft", "out", take=["score"], alpha=0.1)
    Path("sft").rename("gone")
    with pytest.raises(MergeError, match=r"say where it is with sft$"):
        verify("out")


def test_users_of_commands_are_told_of_options(surplus: Path) -> None:
    ready = r"let them through: --take '^score\.weight$'"
    assert ready in subprocess_of("merge", "base", "sft", "-o", "out").error
    ended = subprocess_of("merge", "base", "sft", "--check")
    assert ended.status == 1
    assert ready in ended.out


def test_values_that_clash_are_named_as_they_were_given() -> None:
    with pytest.raises(ArgumentError, match=r"^importance and layer_factors are both given"):
        merge_checkpoints("base", "sft", "out", importance={"0": 1.0}, layer_factors={"0": 1.0})
    with pytest.raises(ArgumentError, match=re.escape('no_drop=[r"("] is not a regular expression')):
        merge_checkpoints("base", "sft", "out", no_drop=["("])
