"""Exit statuses: 2 for a wrong value, 1 for a wrong file; and commands without arguments."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

import mergekit_imm
from cli.conftest import command as command  # a fixture
from commands import SHAPES, Command, subprocess_of, write_pair
from mergekit_imm.cli.analyze import analyze_command
from mergekit_imm.cli.loop import loop_command
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.cli.verify import verify_command
from mergekit_imm.errors import ExtraError
from mergekit_imm.evaluation.results import Result, tradeoff
from mergekit_imm.views.pareto import picture

MERGE, TRAIN = ["base", "sft", "-o", "out"], ["base", "-o", "run", "--train", "true {model} {output}"]
WRONG: list[tuple[click.Command, list[str], str]] = [
    *(
        (merge_command, [*MERGE, *options], said)
        for options, said in [
            (["--alpha", "2"], "alpha is 2; it is the weight of the base, a number in 0 <= alpha <= 1"),
            (["--alpha", "nan"], "is not a number"),
            (["--alpha", "50%"], "'50%' is not a number"),
            (["--alpha", "50"], "alpha is 50; it is the weight of the base"),
            (
                ["--alpha", "0,5"],
                "a number in 0 <= alpha <= 1; commas separate the values of a sweep, a decimal takes a point",
            ),
            (["--alpha", "0,1"], "alpha is a list of 2 values (0, 1), but the output out does not contain {alpha}"),
            (["--alpha", "half"], "'half' is not a number"),
            (["--alpha", "0.1,0.2"], "does not contain"),
            (["--drop", "1"], "(for no change at all use --alpha 1)"),
            (["--seed", "x"], "'x' is not a whole number"),
            (["--iteration", "-1"], "iteration is -1; it must be an integer >= 0"),
            (["--max-shard-size", "5XB"], "size '5XB' is not understood; write it as 5GB"),
            (["--max-shard-size", "5"], "size '5' is in bytes; write 5GB, or 5B if bytes are meant"),
            (["--max-shard-size", "0"], "must be at least one byte"),
            (["--keep", "("], "--keep '(' is not a regular expression"),
            (["--take", "["], "--take '[' is not a regular expression"),
            (["--no-drop", "*"], "--no-drop '*' is not a regular expression"),
            (["--rename", "a"], "rename rule 'a' is not understood: write it as REGEX=REPLACEMENT"),
            (["--rename", "(=b"], "rename rule '(=b' is not understood"),
            (["--sparsify", "nonsense"], "sparsify is 'nonsense'; it must be dare, trim, della"),
            (["--sparsify", "della:0.9"], "epsilon 0.9 does not go with drop 0.2"),
            (["--sparsify", "trim", "--drop", "0.1,0.2", "-o", "out-{drop}"], "several drops or seeds"),
            (["--workers", "0"], "workers is 0; it is a number of threads, at least 1"),
            (["--layer-factors", "lines:1"], "layer factors 'lines:1' are not understood"),
            (["--layer-factors", "groups:1,2,-3"], "are not understood"),
            (["--layer-factors", "factors.json", "--importance", "importance.json"], "are both given"),
            (["--shrink", "0.5"], "and none is given"),
            (
                ["--clip", "0,5", "1", "--importance", "importance.json"],
                "'0,5' is not a number; a decimal takes a point",
            ),
            (["--seed", "1.5"], "'1.5' is not a whole number"),
            (["--workers", "two"], "'two' is not a whole number"),
            (["--device", "gpu"], "device is 'gpu'; it must be 'cpu' or 'cuda', or 'cuda:1' for the second GPU"),
            (["--device", "cuda:x"], "device is 'cuda:x'"),
            (
                ["--keep", "*norm*"],
                "nothing to repeat at position 0; a pattern matches anywhere in the name, so write 'norm'",
            ),
            (["--clip", "2", "1", "--importance", "importance.json"], "clip is (2.0, 1.0)"),
            (["--shrink", "2"], "shrink is 2; it must be a number from 0 to 1"),
            (["--vocab", "mine"], "'mine' is not one of 'strict', 'base', 'sft'"),
            (["--dtype", "int8"], "'int8' is not one of"),
            (["--reference", "sft"], "'sft' is not one of"),
            (["--device", "tpu"], "device is 'tpu'; it must be 'cpu' or 'cuda', or 'cuda:1' for the second GPU"),
            (["--ranks", "mpi"], "'mpi' is not one of"),
            (["more"], "Got 2 models"),
            (["--check", "--ranks", "slurm"], "--check reads only headers"),
            (["--check", "--keep", "("], "--keep '(' is not a regular expression"),
        ]
    ),
    (merge_command, ["base"], "Missing argument 'SFT'"),
    (merge_command, ["base", "sft"], "Missing option '-o' / '--out': give the folder to create, -o merged"),
    (merge_command, ["base", "sft", "m1"], "Missing option '-o' / '--out': give the folder to create, -o m1"),
    (merge_command, ["base", "sft", "sft"], "Missing option '-o' / '--out': give the folder to create, -o merged"),
    (merge_command, ["base", "sft", "-o"], "Option '-o' requires an argument"),
    (merge_command, ["base", "sft", "-o", "out", "--alhpa", "1"], "--alpha"),
    *(
        (verify_command, ["out", *options], said)
        for options, said in [
            (["--sample", "0"], "sample is 0; it is the share to recompute, 0 < sample <= 1"),
            (["--workers", "0"], "workers is 0; it is a number of threads, at least 1"),
            (["--device", "tpu"], "device is 'tpu'"),
        ]
    ),
    *(
        (loop_command, [*TRAIN, *options], said)
        for options, said in [
            (["--alpha", "2"], "alpha is 2.0"),
            (["--alpha", "0.1,0.2"], "has 2 values for 3 rounds"),
            (["--drop", "1"], "drop is 1.0"),
            (["--anchor", "mean"], "anchor is 'mean'"),
            (["--keep", "("], "--keep '(' is not a regular expression"),
            (["--retry", "x"], "is not a list of numbers"),
            (["--gate", "accuracy"], "no evaluate command measures it"),
            (["--sparsify", "nonsense"], "sparsify is 'nonsense'"),
            (["--layer-factors", "lines:1"], "layer factors 'lines:1' are not understood"),
            (["--shrink", "0.5"], "and none is given"),
            (["--train", "true"], "the train command has no {output}"),
            (["--train", "true {modle} {output}"], "did you mean {model}?"),
            (["--generate", "true {data} {output}"], "the generate command has {data}"),
            (["--alpha", "0,5"], "'0,5' has 2 values for 3 rounds; give one per round (a decimal takes a point)"),
            (["--tolerance", "-1"], "tolerance is -1.0; it must be a number, 0 or more"),
            (["--tolerance", "0,1"], "'0,1' is not a number; a decimal takes a point"),
            (["--keep-rounds", "0"], "keep_rounds is 0; give at least 1"),
            (["--seed", "x"], "'x' is not a whole number"),
            (["--rounds", "0"], "rounds is 0; give at least 1"),
        ]
    ),
    (analyze_command, ["samples", "a.jsonl", "--encoder", "encode"], "'encode' is not MODULE:FUNCTION"),
    (analyze_command, ["change", "base", "--vocab", "sft"], "apply to two models"),
    (analyze_command, ["change", "base", "sft", "--keep", "("], "--keep '(' is not a regular expression"),
    (
        analyze_command,
        ["importance", "base", "--data", "x", "-o", "y", "--max-length", "1"],
        "it must be a whole number, 2 or more",
    ),
    (analyze_command, ["importance", "base", "--data", "x", "-o", "y", "--device", "tpu"], "device is 'tpu'"),
    (analyze_command, ["importance", "base", "--data", "x", "-o"], "Option '-o' requires an argument"),
    (analyze_command, ["importance", "base", "--data", "x", "-o", "y", "--samples", "0"], "samples is 0"),
    (analyze_command, ["kl", "base", "sft", "--data", "x", "--batch-size", "0"], "batch_size is 0"),
    (analyze_command, ["samples", "a.jsonl", "--seed", "-1"], "seed is -1; it must be a whole number, 0 or more"),
    (analyze_command, ["change", "base", "sft", "--workers", "0"], "workers is 0; it is a number of threads"),
    (analyze_command, ["--version=1"], "does not take a value"),
    (analyze_command, ["nonsense"], "No such command 'nonsense'"),
]
BAD_FILES: list[tuple[click.Command, list[str], str]] = [
    (merge_command, ["nowhere", "sft", "-o", "out"], "base nowhere does not exist"),
    (merge_command, [*MERGE, "--importance", "none.json"], "importance file none.json cannot be read"),
    (merge_command, [*MERGE, "--importance", "bad.json"], "importance file bad.json is not JSON"),
    (merge_command, [*MERGE, "--layer-factors", "none.json"], "none.json cannot be read"),
    (merge_command, [*MERGE, "--keep", "nothing"], "matches none of the 5 tensor names"),
    (merge_command, [*MERGE, "--start", "sft"], "has no imm_recipe.json"),
    (verify_command, ["nowhere"], "nowhere does not exist; give a folder that imm-merge made"),
    (verify_command, ["base"], "base has no imm_recipe.json"),
    (verify_command, ["base/config.json"], "base/config.json is not a folder; give a folder that imm-merge made"),
    (analyze_command, ["change", "nowhere"], "nowhere does not exist; give BASE and SFT"),
    (analyze_command, ["change", "base/config.json"], "base/config.json is not a folder; give BASE and SFT"),
    (loop_command, ["nowhere", *TRAIN[1:]], "base nowhere does not exist"),
    (analyze_command, ["samples", "nowhere.jsonl"], "nowhere.jsonl"),
    (analyze_command, ["change", "base", "nowhere"], "sft nowhere does not exist"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_pair(tmp_path))
    (tmp_path / "importance.json").write_text('{"0": 1.0, "1": 2.0}')
    (tmp_path / "bad.json").write_text("{")
    return tmp_path


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("which", "arguments", "said"), WRONG, ids=[" ".join(a) for _, a, _ in WRONG])
def test_a_wrong_value_is_wrong_usage(
    which: click.Command, arguments: list[str], said: str, here: Path, command: Command
) -> None:
    before = written(here)
    ended = command(which, *arguments)
    assert ended.status == 2, ended.err
    assert said in ended.error
    usage = re.match(r"Usage: (imm-\w+( (?!nonsense)[a-z]+)?) \[OPTIONS\] ", ended.err)
    assert usage is not None
    assert re.search(f"(; see|[?] See) {usage[1]} --help$", ended.error)
    assert (ended.out, written(here)) == ("", before)


@pytest.mark.parametrize(("which", "arguments", "said"), BAD_FILES, ids=[" ".join(a) for _, a, _ in BAD_FILES])
def test_a_missing_or_bad_file_is_a_failure(
    which: click.Command, arguments: list[str], said: str, here: Path, command: Command
) -> None:
    ended = command(which, *arguments)
    assert ended.status == 1, ended.err
    assert said in ended.error
    assert "Usage" not in ended.err


def test_a_pattern_without_its_stars_is_one(here: Path, command: Command) -> None:
    said = command(merge_command, *MERGE, "--keep", "*norm*").error
    cure = re.search(r"so write '(.*?)'", said)
    assert cure is not None
    ended = command(merge_command, *MERGE, "--keep", cure[1], "--json")
    assert json.loads(ended.out)["tensors"]["kept"] == 1  # model.norm.weight
    assert "so write" not in command(merge_command, *MERGE, "--keep", "*").error
    assert "so write" not in command(merge_command, *MERGE, "--keep", "*(").error


@pytest.mark.parametrize(("options", "name"), [(["m1"], "m1"), (["a b"], "'a b'"), ([], "merged")])
def test_a_merge_without_out_is_cured_as_said(here: Path, command: Command, options: list[str], name: str) -> None:
    said = command(merge_command, "base", "sft", *options).error
    assert said == f"Missing option '-o' / '--out': give the folder to create, -o {name}; see imm-merge --help"
    assert command(merge_command, "base", "sft", *shlex.split(f"-o {name}")).status == 0


def test_dtypes_have_short_names(here: Path, command: Command) -> None:
    for short, long in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        ended = command(merge_command, "base", "sft", "-o", f"out-{short}", "--dtype", short, "--json")
        assert json.loads(ended.out)["parameters"]["dtype"] == long
    assert "[base|start|bfloat16|float16|float32]" in command(merge_command, "--help").out


def test_a_group_alone_prints_its_help(command: Command) -> None:
    ended = command(analyze_command)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("Usage: imm-analyze [OPTIONS] COMMAND")
    assert "\n  samples " in ended.err
    assert "error:" not in ended.err
    assert ended.err == command(analyze_command, "--help").out


def test_the_version_of_the_module() -> None:
    ended = subprocess_of("--version")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out == f"mergekit_imm, version {mergekit_imm.__version__}\n"
    assert mergekit_imm.__version__ == importlib.metadata.version("mergekit-imm")


def test_tensors_larger_than_a_file_may_be_are_named(here: Path, command: Command) -> None:
    ended = command(merge_command, *MERGE, "--max-shard-size", "200B")
    assert ended.status == 0
    assert ended.err == (
        "note: 'lm_head.weight' has 512 bytes, more than --max-shard-size: 2 tensors have files of their own,"
        " because tensors are not split\n"
    )
    assert len(list((here / "out").glob("*.safetensors"))) == len(SHAPES) - 1  # the norm has 16 bytes
    assert command(merge_command, "base", "sft", "-o", "other", "--max-shard-size", "1KB").err == ""


def test_check_says_that_values_are_not_read(here: Path, command: Command) -> None:
    ended = command(merge_command, "base", "sft", "--check")
    assert ended.out.startswith("sft can be merged into base, judging by headers alone: values are not read\n")


def test_without_matplotlib_everything_else_is_written(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    note = "note: no pictures, as matplotlib is not installed; pip install 'matplotlib>=3.9'\n"
    ended = command(analyze_command, "change", "base", "sft", "-o", "report")
    assert ended.status == 0
    assert note in ended.err
    assert written(here / "report") == ["change.json", "report.html"]
    (here / "samples.jsonl").write_text(
        "".join(json.dumps({"problem": "1", "response": "5", "correct": True, "model": model}) + "\n" for model in "ab")
    )
    ended = command(analyze_command, "samples", "samples.jsonl", "-o", "samples")
    assert (ended.status, ended.err) == (0, note)
    assert written(here / "samples") == ["samples.json"]
    assert note not in command(analyze_command, "change", "base", "sft", "-o", "report", "-q").err
    found = tradeoff([Result("a", "p", {"x": 1.0, "y": 1.0})], "x", "y")
    with pytest.raises(ExtraError, match=r"a picture needs matplotlib, which is not .*'matplotlib>=3.9'"):
        picture(found)
    copy = "cp -r {model} {output}"
    measure = "echo '{\"x\": 1}' > {json}; true {model}"
    ended = command(loop_command, "base", "-o", "run", "--rounds", "1", "--train", copy, "--evaluate", measure)
    assert ended.status == 0, ended.err
    assert note in ended.err
