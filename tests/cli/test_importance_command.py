"""`imm-analyze importance` end to end: tokens, importance files, refusals."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from analysed import RESPONSES, WORDS, jsonl, link_and_write
from checkpoints import read_model
from commands import Ended
from mergekit_imm import ArgumentError, layer_importance, merge_checkpoints
from mergekit_imm.analysis.calibration import batches, read_lines, tokenised
from mergekit_imm.cli import console
from mergekit_imm.cli.importance import importance_command
from models import fine_tuned, new_model, save

Measure = Callable[..., Ended]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for layout in ("llama", "gemma3", "qwen2"):
        save(new_model(layout), folder / layout, "base", "20KB")
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with links to models, and texts."""
    monkeypatch.chdir(tmp_path)
    link_and_write(models, tmp_path, RESPONSES)
    return tmp_path


@pytest.fixture
def measure(here: Path, capfd: pytest.CaptureFixture[str]) -> Measure:
    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            console.run_and_exit(importance_command, list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    return run


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def expected(folder: Path, with_prompt: bool) -> Any:
    """Compute the same with transformers and `layer_importance`, one sequence at a time, from given token ids."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt, response in RESPONSES:
        tokens = torch.tensor([ids(f"{prompt} {response}") + ([] if with_prompt else [2])])
        labels = tokens.clone()
        labels[:, : 0 if with_prompt else len(ids(prompt))] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return layer_importance(model, found)


@pytest.mark.parametrize(("data", "with_prompt"), [("pairs.jsonl", False), ("texts.jsonl", True)])
@pytest.mark.parametrize("options", [(), ("--batch-size", 2, "--accumulate", "disk"), ("--batch-size", 9)])
def test_the_file_and_what_is_shown(
    here: Path, measure: Measure, data: str, with_prompt: bool, options: tuple[object, ...]
) -> None:
    ended = measure("llama", "--data", data, "-o", "out.json", *options)
    assert (ended.status, ended.err) == (0, "")
    content = json.loads((here / "out.json").read_text())
    wanted = expected(here / "llama", with_prompt)
    assert content["layers"] == pytest.approx(wanted.layers, rel=1e-5)
    assert content["loss"] == pytest.approx(wanted.loss, rel=1e-5)
    assert (content["sequences"], content["tokens"]) == (3, wanted.tokens)
    assert (content["format"], content["version"]) == ("mergekit_imm importance", 1)
    digest = blake2b((here / data).read_bytes(), digest_size=16).hexdigest()
    assert content["data"] == {"file": data, "blake2b": digest, "examples": 3}
    assert content["model"]["path"] == "llama"
    assert len(content["model"]["files"]) == len(list((here / "llama").glob("*.safetensors"))) > 1
    shown = ended.out.splitlines()
    largest = max(wanted.layers, key=wanted.layers.__getitem__)
    bars = {line.split()[0]: line.count("█") for line in shown if line.startswith("model.layers")}
    assert list(bars) == list(wanted.layers)
    assert bars[largest] == max(bars.values()) == 30
    assert shown[-1] == "written to out.json"
    assert sorted(path.name for path in here.iterdir()) == [
        "gemma3",
        "llama",
        "out.json",
        "pairs.jsonl",
        "qwen2",
        "texts.jsonl",
    ]


def test_the_same_command_writes_the_same_bytes_and_json_prints_them(here: Path, measure: Measure) -> None:
    arguments = ("llama", "--data", "pairs.jsonl", "--order", "mix", "-o", "out.json")
    measure(*arguments)
    first = (here / "out.json").read_bytes()
    ended = measure(*arguments, "--json")
    assert (here / "out.json").read_bytes() == first
    assert json.loads(ended.out) == json.loads(first)
    assert measure(*arguments, "-q").out == ""


@pytest.mark.parametrize("layout", ["llama", "gemma3"])
def test_a_merge_takes_the_file(layout: str, here: Path, measure: Measure) -> None:
    """Also where layers have other names in memory than in files, as in Gemma 3."""
    assert measure(layout, "--data", "texts.jsonl", "-o", "out.json").status == 0
    save(fine_tuned(new_model(layout), seed=2), here / "sft", "base", "20KB")
    merge_checkpoints(layout, "sft", "merged", drop=0.0, importance="out.json")
    merge_checkpoints(layout, "sft", "plain", drop=0.0)
    merged, plain = read_model(here / "merged"), read_model(here / "plain")
    changed = {name for name in plain if not torch.equal(merged[name], plain[name])}
    layers = json.loads((here / "out.json").read_text())["layers"]
    assert changed
    assert all(any(name.startswith(f"{layer}.") for layer in layers) for name in changed)


def test_the_tokenizer_is_that_of_the_files(here: Path, measure: Measure) -> None:
    """For Qwen2, AutoTokenizer of transformers 5 builds its own tokenizer, which knows none of these words."""
    measure("qwen2", "--data", "texts.jsonl", "-o", "out.json")
    content = json.loads((here / "out.json").read_text())
    assert content["layers"] == pytest.approx(expected(here / "qwen2", with_prompt=True).layers, rel=1e-5)


def test_what_is_cut_is_told(here: Path, measure: Measure) -> None:
    ended = measure("llama", "--data", "pairs.jsonl", "-o", "out.json", "--max-length", 4, "--samples", 9)
    assert ended.err.splitlines() == [
        "note: 2 of 3 sequences were longer than 4 tokens; 3 tokens were cut off at the end",
        "note: pairs.jsonl holds 3 examples, fewer than the 9 asked for",
    ]
    content = json.loads((here / "out.json").read_text())
    assert (content["cut_sequences"], content["cut_tokens"], content["tokens"]) == (2, 3, 7)
    measure("llama", "--data", "pairs.jsonl", "-o", "out.json", "--samples", 1)
    content = json.loads((here / "out.json").read_text())
    assert (content["sequences"], content["tokens"], content["data"]["examples"]) == (1, 3, 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no examples"),
        ('{"text": "merge back"}\nno\n', "line 2 is not JSON"),
        (
            '{"text": "merge back"}\n{"prompt": "a", "response": "b"}\n',
            "line 2 has prompt and response, but line 1 has",
        ),
        ('{"prompt": "a", "answer": "b"}\n', 'line 1 has prompt, answer; write an object with "text", or'),
        ('{"prompt": "a", "response": "b", "text": "c"}\n', "line 1 has prompt, response, text; write an object"),
        ("[1]\n", "line 1 is not an object; write an object"),
        ('\n\n{"text": ""}\n', "line 3: text is ''; it must be a non-empty string"),
        ('{"text": 3}\n', "line 1: text is 3; it must be a non-empty string"),
        ('{"text": "a", "text": "b"}\n', "line 1 is not JSON: the name 'text' appears twice"),
        ('{"text": "merge"}\n', "line 1 has 1 tokens, 0 of them in the prompt, and none of the first 1024"),
        ('{"prompt": "merge back merge", "response": "back"}\n', "line 1 has 5 tokens, 3 of them in the prompt"),
    ],
)
def test_bad_lines_are_named(lines: str, message: str, here: Path, measure: Measure) -> None:
    (here / "bad.jsonl").write_text(lines)
    more = ("--max-length", 3) if "5 tokens" in message else ()
    ended = measure("llama", "--data", "bad.jsonl", "-o", "out.json", *more)
    assert ended.status == 1
    assert "bad.jsonl" in ended.error
    assert message in ended.error
    assert not (here / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing/", "--data", "texts.jsonl", "-o", "o"), "model nothing does not exist; give a folder"),
        (("llama", "--data", "nothing", "-o", "o"), "data file nothing cannot be read: No such file or directory"),
        (("llama", "--data", "~nobody-here/x", "-o", "o"), "data file ~nobody-here/x cannot be read: Could not"),
        (("llama", "--data", "llama", "-o", "o"), "data file llama cannot be read: it is not a plain file"),
        (("llama", "--data", "texts.jsonl", "-o", "llama"), "output llama is a folder; give a file name"),
        (("llama", "--data", "texts.jsonl", "-o", "no/o"), "its folder no does not exist; create it"),
        (("llama", "--data", "texts.jsonl", "-o", "texts.jsonl"), "texts.jsonl exists and is not an importance file"),
        (
            ("llama", "--data", "texts.jsonl", "-o", "o", "--device", "xpu"),
            "device is 'xpu'; it must be",
        ),
        (
            ("llama", "--data", "texts.jsonl", "-o", "o", "--device", "a b"),
            "device is 'a b'; it must be",
        ),
        (("strange", "--data", "texts.jsonl", "-o", "o"), "the tokenizer of model strange cannot be loaded"),
        (("failing", "--data", "texts.jsonl", "-o", "o"), "model failing fails to run: The size of tensor a"),
        (("unknown", "--data", "texts.jsonl", "-o", "o"), "model unknown cannot be loaded: The checkpoint you are"),
        (("lacking", "--data", "texts.jsonl", "-o", "o"), "model lacking lacks 1 of the weights"),
        (("quantised", "--data", "texts.jsonl", "-o", "o"), "model quantised is quantised and has no gradients"),
        (("bare", "--data", "texts.jsonl", "-o", "o"), "model bare has no config.json"),
        (
            ("small", "--data", "texts.jsonl", "-o", "o"),
            "its tokenizer produces token 90, but its embedding has 6 rows",
        ),
        (("llama", "--data", "long.jsonl", "-o", "o"), "has 64 positions, but the longest sequence has 70 tokens"),
        (("llama", "--data", "texts.jsonl"), "Missing option '-o'"),
    ],
)
def test_refusals_are_one_line(arguments: tuple[str, ...], message: str, here: Path, measure: Measure) -> None:
    broken(here, arguments[0])
    jsonl(here / "long.jsonl", [{"text": "merge " * 70}])
    before = (here / "texts.jsonl").read_bytes()
    ended = measure(*arguments)
    assert message in ended.error
    assert ended.status == (2 if "Missing" in message or "device is" in message else 1)
    assert not (here / "o").exists()
    assert (here / "texts.jsonl").read_bytes() == before


def broken(here: Path, name: str) -> None:
    """Make a faulty model."""
    if name not in ("strange", "lacking", "quantised", "bare", "small", "failing", "unknown"):
        return
    model = new_model("deepseek_v3" if name == "failing" else "llama")  # this deepseek_v3 has incompatible head sizes
    if name == "small":
        model.resize_token_embeddings(6)
    folder = save(model, here / name, "base")
    config = json.loads((folder / "config.json").read_text())
    if name == "strange":
        (folder / "tokenizer.json").write_text("{}")
    elif name == "lacking":
        config["num_hidden_layers"] = 2
        from safetensors.torch import save_file

        state = read_model(folder)
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif name == "unknown":
        config["model_type"] = "nothing_known"
    elif name == "quantised":
        config["quantization_config"] = {"quant_method": "fp8"}
    elif name == "small":
        words = json.loads((folder / "tokenizer.json").read_text())
        words["model"]["vocab"]["back"] = 90
        (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "config.json").write_text(json.dumps(config))
    if name == "bare":
        (folder / "config.json").unlink()


def test_without_transformers_the_cure_is_named(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    ended = measure("llama", "--data", "texts.jsonl", "-o", "o")
    assert ended.error == (
        "loading a model needs transformers, which is not installed; pip install 'transformers>=4.56'"
    )


def tokenizer(before: str = "", after: str = "", words: Any = Whitespace) -> Any:
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = words()
    inner.post_processor = TemplateProcessing(
        single=" ".join(filter(None, [before, "$A", after])), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    ("row", "before", "after", "found", "prompt"),
    [
        ({"text": "merge back"}, "", "", [3, 4], 0),
        ({"text": "merge back"}, "<s>", "</s>", [1, 3, 4, 2], 0),
        ({"text": "<s> merge back"}, "<s>", "", [1, 3, 4], 0),  # no second bos
        ({"prompt": "merge", "response": " back"}, "", "", [3, 4, 2], 1),
        ({"prompt": "merge", "response": " back </s>"}, "", "", [3, 4, 2], 1),  # no second eos
        ({"prompt": "merge", "response": " back"}, "<s>", "</s>", [1, 3, 4, 2], 2),  # no eos between
        ({"prompt": "", "response": "merge back"}, "<s>", "", [1, 3, 4, 2], 1),
        ({"prompt": "mer", "response": "ge back"}, "<s>", "", [1, 0, 0, 4, 2], 2),  # "merge", one word, is split
    ],
)
def test_tokens_of_an_example(
    row: dict[str, str], before: str, after: str, found: list[int], prompt: int, tmp_path: Path
) -> None:
    lines = read_lines(jsonl(tmp_path / "a.jsonl", [row]))
    (one,) = tokenised(lines, tokenizer(before, after), 99)
    assert (list(one.ids), one.prompt, one.cut) == (found, prompt, 0)


def test_the_end_is_what_is_cut_off(tmp_path: Path) -> None:
    lines = read_lines(jsonl(tmp_path / "a.jsonl", [{"prompt": "merge", "response": " back base base"}]))
    (one,) = tokenised(lines, tokenizer(), 3)
    assert (one.ids, one.prompt, one.cut) == ((3, 4, 5), 1, 2)


def test_batches_are_padded_on_the_right(tmp_path: Path) -> None:
    rows = [
        {"prompt": p, "response": r} for p, r in [("merge ", "back"), ("back back ", "base merge"), ("base ", "back")]
    ]
    sequences = tokenised(read_lines(jsonl(tmp_path / "a.jsonl", rows)), tokenizer(), 99)
    first, second = batches(sequences, 2, padding=5)
    assert first["input_ids"].tolist() == [[3, 4, 2, 5, 5], [4, 4, 5, 3, 2]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert first["labels"].tolist() == [[-100, 4, 2, -100, -100], [-100, -100, 5, 3, 2]]
    assert second["input_ids"].tolist() == [[5, 4, 2]]


def test_lines_beyond_the_samples_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "merge back"}\n{}\n')
    with pytest.raises(ArgumentError, match=re.escape("a.jsonl, line 2 has no keys")):
        read_lines(path, samples=1)
