"""`imm-analyze kl` end to end: numbers, adapters, vocabularies, the file of a loop's numbers, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from analysed import RESPONSES, WORDS, link_and_write
from commands import Command, Ended
from mergekit_imm.cli.kl import kl_command
from mergekit_imm.loop import Settings, run_loop
from mergekit_imm.views.loop_summary import table
from models import fine_tuned, new_model, save

TWICE = RESPONSES * 2  # with fewer there is no interval


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = new_model("llama")
    save(base, folder / "base", "base")
    save(fine_tuned(base, seed=2), folder / "sft", "base")
    save(fine_tuned(base, seed=3), folder / "other", "tokenizer")
    wider = fine_tuned(base, seed=4)
    wider.resize_token_embeddings(100)
    save(wider, folder / "wider", "base")
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with links to models, and texts."""
    monkeypatch.chdir(tmp_path)
    link_and_write(models, tmp_path, TWICE)
    return tmp_path


@pytest.fixture
def measure(here: Path, command: Command) -> Command:
    return lambda *arguments: command(kl_command, *arguments)


def loaded(folder: Path | str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def expected(base: Any, model: Any, with_prompt: bool = False) -> tuple[float, int]:
    """KL(base || model) with transformers and torch, from given token ids; `p` may have fewer tokens than `q`."""
    found = []
    for prompt, response in TWICE:
        words = [WORDS.index(word) for word in f"{prompt} {response}".split()]
        ids = torch.tensor([words if with_prompt else [*words, 2]])
        with torch.no_grad():
            p, q = (each(input_ids=ids).logits[0].double().log_softmax(1) for each in (base, model))
        each = (p.exp() * (p - q[:, : p.shape[1]])).sum(1)
        found += each[0 if with_prompt else len(prompt.split()) - 1 : -1].tolist()
    return sum(found) / len(found), len(found)


def kl_of(ended: Ended) -> list[float]:
    assert (ended.status, ended.err) == (0, "")
    return [each["kl"]["value"] for each in json.loads(ended.out)["models"]]


@pytest.mark.parametrize(("data", "with_prompt"), [("pairs.jsonl", False), ("texts.jsonl", True)])
def test_the_numbers(here: Path, measure: Command, data: str, with_prompt: bool) -> None:
    value, tokens = expected(loaded("base"), loaded("sft"), with_prompt)
    ended = measure("base", "sft", "base", "--data", data, "--batch-size", 4, "--json")
    content = json.loads(ended.out)
    assert kl_of(ended) == [pytest.approx(value, rel=1e-5), 0.0]
    assert content["format"] == "mergekit_imm kl 1"
    assert content["base"]["path"] == "base"
    assert [each["model"]["path"] for each in content["models"]] == ["sft", "base"]
    assert {(each["texts"], each["tokens"]) for each in content["models"]} == {(6, tokens)}
    assert content["models"][0]["kl"]["low"] < value < content["models"][0]["kl"]["high"]
    assert content["data"]["examples"] == 6
    assert kl_of(measure("base", "sft", "--data", data, "--json")) == [pytest.approx(value, rel=1e-5)]
    assert {path.name for path in here.iterdir()} == {"base", "sft", "other", "wider", "pairs.jsonl", "texts.jsonl"}


def test_completions_are_responses(here: Path, measure: Command) -> None:
    """As TRL names them."""
    text = (here / "pairs.jsonl").read_text()
    (here / "completions.jsonl").write_text(text.replace('"response"', '"completion"'))
    assert "completion" in (here / "completions.jsonl").read_text()
    of_pairs = kl_of(measure("base", "sft", "--data", "pairs.jsonl", "--json"))
    assert kl_of(measure("base", "sft", "--data", "completions.jsonl", "--json")) == of_pairs


def test_the_table(here: Path, measure: Command) -> None:
    value, tokens = expected(loaded("base"), loaded("sft"))
    ended = measure("base", "sft", "--data", "pairs.jsonl")
    title, _, line = ended.out.splitlines()
    assert title == f"KL(base || model), nats per token, on {tokens} tokens of 6 texts"
    assert line.split()[:2] == ["sft", f"{value:#.3g}"]
    ended = measure("base", "sft", "--data", "pairs.jsonl", "--samples", 5, "--max-length", 4)
    assert ended.out.splitlines()[-1] == "no interval: fewer than 6 texts"
    assert ended.err == "note: 4 of 5 texts were longer than 4 tokens; 6 tokens were cut off at the end\n"
    assert measure("base", "sft", "--data", "pairs.jsonl", "-q") == Ended(0, "", "")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft calls in transformers
def test_an_adapter(here: Path, measure: Command) -> None:
    """It is added to the model that its config names if that is a folder here, as a loop's second round needs."""
    for start in ("base", "sft"):
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        whole = peft.get_peft_model(loaded(start), options)
        whole.save_pretrained(f"on-{start}")
        value, _ = expected(loaded("base"), whole.eval())
        ended = measure("base", f"on-{start}", "--data", "pairs.jsonl", "--json")
        assert ended.err.strip() in (
            "note: model on-base is an adapter, and is added to base base",
            "note: model on-sft is an adapter, and is added to start sft",
        )
        assert json.loads(ended.out)["models"][0]["kl"]["value"] == pytest.approx(value, rel=1e-4)
    config = json.loads(Path("on-base/adapter_config.json").read_text())
    Path("on-base/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/elsewhere"}))
    ended = measure("base", "on-base", "--data", "pairs.jsonl")
    assert (ended.status, ended.err) == (0, "note: model on-base is an adapter, and is added to base base\n")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft calls in transformers
def test_an_adapter_without_peft(here: Path, measure: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    peft.get_peft_model(loaded("base"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained("adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    ended = measure("base", "adapter", "--data", "pairs.jsonl")
    assert ended.status == 1
    assert ended.err.endswith("error: model adapter is an adapter; adding it needs peft: pip install peft\n")


def test_more_rows_than_the_other(here: Path, measure: Command) -> None:
    """The model's own tokens take probability from base's; those of base alone may only be padding."""
    value, _ = expected(loaded("base"), loaded("wider"))
    assert kl_of(measure("base", "wider", "--data", "pairs.jsonl", "--json")) == [pytest.approx(value, rel=1e-5)]
    cut = loaded("wider")
    cut.resize_token_embeddings(96)
    value, _ = expected(cut, loaded("base"))
    ended = measure("wider", "base", "--data", "pairs.jsonl", "--json")
    assert ended.err == ("note: model base has 96 rows for tokens, base 4 more, which are padding: they are left out\n")
    assert json.loads(ended.out)["models"][0]["kl"]["value"] == pytest.approx(value, rel=1e-5)


def test_other_tokens(here: Path, measure: Command) -> None:
    ended = measure("base", "other", "--data", "pairs.jsonl")
    assert ended.status == 1
    assert ended.err == (
        "error: 1 of the first 6 ids are different tokens in base base and model other: 5 ('base' and 'tokenizer');"
        " the KL of different tokens has no meaning; give models with the same tokenizer\n"
    )


def test_tokens_that_the_model_lacks(here: Path, measure: Command) -> None:
    small = loaded("base")
    small.resize_token_embeddings(4)
    save(small, here / "small", "base")
    ended = measure("base", "small", "--data", "pairs.jsonl")
    assert ended.status == 1
    assert ended.err == (
        "error: model small has 4 rows for tokens, and lacks 2 tokens of base, first 'back' (4);"
        " KL(base || model) would be infinite\n"
    )


def test_without_a_tokenizer_of_its_own(here: Path, measure: Command) -> None:
    """As trainers leave a checkpoint: the texts are base's tokens anyhow."""
    fine_tuned(new_model("llama"), seed=2).save_pretrained("bare")
    ended = measure("base", "bare", "--data", "pairs.jsonl", "--json")
    assert ended.err == "note: model bare has no tokenizer, so the models' tokens were not compared\n"
    assert json.loads(ended.out)["models"][0]["kl"]["value"] == pytest.approx(
        expected(loaded("base"), loaded("sft"))[0], rel=1e-5
    )


def test_added_to_the_numbers_of_a_loop(here: Path, measure: Command) -> None:
    """The file of an evaluate command gets one more number; a gate may ask for it, and the table shows it."""
    Path("numbers.json").write_text('{"accuracy": {"math": 0.5}}')
    assert measure("base", "sft", "--data", "pairs.jsonl", "-q", "--add-to", "numbers.json").err == ""
    value, _ = expected(loaded("base"), loaded("sft"))
    assert json.loads(Path("numbers.json").read_text()) == {
        "accuracy": {"math": 0.5},
        "kl": pytest.approx(value, rel=1e-5),
    }
    ended = measure("base", "sft", "--data", "pairs.jsonl", "--add-to", "numbers.json")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == "error: numbers.json already holds 'kl'; remove it, or give another file\n"
    measure("base", "sft", "--data", "pairs.jsonl", "-q", "--add-to", "new.json")
    assert list(json.loads(Path("new.json").read_text())) == ["kl"]


@pytest.mark.parametrize(("tolerance", "alphas", "stopped"), [(1.0, {"0": 0.25}, False), (0.0, {"0": 0.75}, True)])
def test_a_gate_of_a_loop(here: Path, tolerance: float, alphas: dict[str, float], stopped: bool) -> None:
    python, program = sys.executable, "mergekit_imm analyze kl"
    settings = Settings(
        base="base",
        train="cp -r -L sft {output}",
        evaluate=f"{python} -m {program} {{base}} {{model}} --data pairs.jsonl -q --add-to {{json}}",
        rounds=1,
        alpha="0.25",
        gate="-kl",
        tolerance=tolerance,
        retry=(0.75,),
    )
    state = run_loop(settings, "run")
    assert state.alphas == alphas
    assert bool(state.stopped) is stopped
    assert state.metrics["base"] == {"kl": 0.0}
    sft = expected(loaded("base"), loaded("sft"))[0]
    assert state.metrics["0/sft"]["kl"] == pytest.approx(sft, rel=1e-5)
    assert state.metrics["0/merged"]["kl"] == pytest.approx(
        expected(loaded("base"), loaded("run/round-0/merged"))[0], rel=1e-5
    )
    assert "kl" in table(state).splitlines()[0].split()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "numbers.json is not JSON: "),
        ("[1]", "numbers.json is not a JSON object; give another file"),
    ],
)
def test_files_that_are_not_added_to(here: Path, measure: Command, content: str, message: str) -> None:
    """Before any model is loaded: `nothing` does not exist."""
    Path("numbers.json").write_text(content)
    ended = measure("nothing", "sft", "--data", "pairs.jsonl", "--add-to", "numbers.json")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(f"error: {message}")
    assert Path("numbers.json").read_text() == content


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("base", "sft", "sft2", "--data", "pairs.jsonl", "--add-to", "x.json"), 2, "--add-to takes the number of one"),
        (("base", "sft", "--data", "pairs.jsonl", "--add-to", "no/x.json"), 1, "its folder no does not exist; create"),
        (("base", "sft", "--data", "no.jsonl"), 1, "data file no.jsonl cannot be read"),
        (("base", "no", "--data", "pairs.jsonl"), 1, "model no does not exist"),
        (("no", "sft", "--data", "pairs.jsonl"), 1, "base no does not exist"),
        (("base", "sft/model.safetensors", "--data", "pairs.jsonl"), 1, "has no config.json; give the folder"),
        (("base", "sft", "--data", "pairs.jsonl", "--device", "tpu"), 2, "device"),
        (("base", "sft", "--data", "texts.jsonl", "--max-length", 100, "--samples", 0), 2, "--samples"),
        (("base",), 2, "Missing argument"),
    ],
)
def test_refused(here: Path, measure: Command, arguments: tuple[object, ...], status: int, message: str) -> None:
    ended = measure(*arguments)
    assert (ended.status, ended.out) == (status, "")
    assert message in ended.err.splitlines()[-1]
    assert not Path("x.json").exists()
