"""The scripts of examples/real_model, on a tiny model that knows a few sums."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from commands import HUNG

EXAMPLE = Path(__file__).parents[2] / "examples" / "real_model"
SUMS = [(f"{a}+{b}", str(a + b)) for a in range(2, 6) for b in range(2, 6)]


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Any:
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    for name in ("answers", "score", "tasks", "evidence", "controls", "experiments"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, which has learnt some of the sums by heart, and questions."""
    folder = tmp_path_factory.mktemp("real")
    tiny = EXAMPLE.parent / "trainers" / "tiny.py"
    subprocess.run([sys.executable, tiny], cwd=folder, check=True, timeout=HUNG)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    text = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in SUMS[:8])
    ids = tokenizer(text, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(60):
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder / "base")
    lines = [{"question": q, "answer": a, "example": at < 2} for at, (q, a) in enumerate(SUMS)]
    (folder / "sums.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    choices = [{"question": q, "answer": a, "choices": [a, "77", "4"]} for q, a in SUMS[:5]]
    (folder / "choices.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in choices))
    (folder / "text.txt").write_text("The sea was calm that morning, and no wind stirred the sails. " * 30)
    return folder


def test_answers_are_those_of_generating_one_by_one(model: Path) -> None:
    import answers

    questions = answers.read_questions(str(model / "sums.jsonl"))
    assert (len(questions.asked), len(questions.examples)) == (14, 2)
    generator = answers.open_generator(str(model / "base"), seed=0, longest=6, batch=5)
    found = [each[0].text for each in generator.answers(questions, 1, 0.0)]
    network, tokenizer = generator.model, generator.tokenizer
    shown = "".join(f"Q: {each.question}\nA: {each.answer}\n" for each in questions.examples)
    for one, text in zip(questions.asked, found, strict=True):
        ids = tokenizer(f"{shown}Q: {one.question}\nA:", return_tensors="pt").input_ids
        tokens = network.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        alone = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == alone.partition("\n")[0]
    assert sum(questions.is_right(text, one.answer) for text, one in zip(found, questions.asked, strict=True)) > 0
    several = generator.answers(questions, 3, 1.5)
    assert [len(each) for each in several] == [3] * 14
    assert len({answer.text for each in several for answer in each}) > 5


@pytest.mark.parametrize(
    ("response", "answer", "after_examples", "in_a_chat"),
    [
        (" 12", "12", True, True),
        ("12.0", "12", True, True),
        ("13", "12", False, False),
        ("70000", "70,000", True, True),
        ("The answer is 12.", "12", False, True),
        ("Q 12", "12", False, True),
        ("12 apples", "12", False, True),
        ("cat", "Cat", False, False),
        ('{"a": 1}', '{"a": 1}', True, True),
    ],
)
def test_what_is_right(response: str, answer: str, after_examples: bool, in_a_chat: bool) -> None:
    import answers

    one = answers.Question("?", answer)
    assert answers.Questions([one], [one]).is_right(response, answer) == after_examples
    assert answers.Questions([one], []).is_right(response, answer) == in_a_chat


def test_scores_are_those_of_transformers_losses(model: Path) -> None:
    import answers
    import score

    network, tokenizer = answers.load(str(model / "base"))
    questions = answers.read_questions(str(model / "choices.jsonl"))
    found = score.choose(network, tokenizer, questions, batch=4)
    right = ""
    for one in questions.asked:
        values = {}
        for choice in one.choices:
            start = tokenizer(f"Q: {one.question}\nA:", return_tensors="pt").input_ids
            ids = tokenizer(f"Q: {one.question}\nA: {choice}", return_tensors="pt").input_ids
            labels = ids.clone()
            labels[:, : start.shape[1]] = -100
            loss = network(input_ids=ids, labels=labels).loss.item()
            values[choice] = -loss * (ids.shape[1] - start.shape[1]) / len(choice)
        right += "01"[max(values, key=lambda choice: values[choice]) == one.answer]
    assert str(found["right"]) == right
    text = (model / "text.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    losses = [network(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    assert score.perplexity(network, tokenizer, text)["perplexity"] == pytest.approx(
        math.exp(sum(losses) / len(losses))
    )
    assert score.distance(network, network) == 0


def run(script: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLE / script), *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HUNG, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.thorough
def test_a_round_by_the_loop_with_each_control(model: Path) -> None:
    ask = f"--questions {model / 'sums.jsonl'} --longest 6"
    python = f"{sys.executable} {EXAMPLE}"
    best = f"--keep-best sums={model / 'sums.jsonl'} others={model / 'sums.jsonl'} --longest-answer 6"
    command = [
        *(sys.executable, "-m", "mergekit_imm", "loop", "base", "--rounds", "1", "--dtype", "float32", "-o", "run"),
        *("--generate", f"{python}/generate.py --model {{model}} --output {{output}} {ask} --count 4 --seed {{round}}"),
        "--train",
        f"{python}/finetune.py --model {{model}} --data {{data}} --output {{output}} --lr 1e-3 --batch 2"
        f" --accumulation 1 --pull --text {model / 'text.txt'} {best}",
        "--evaluate",
        f"{python}/score.py --model {{model}} --base {{base}} --json {{json}} --inside sums --longest 6 --samples 2"
        f" --sampled sums --questions sums={model / 'sums.jsonl'} choices={model / 'choices.jsonl'}"
        f" text={model / 'text.txt'}",
    ]
    ended = subprocess.run(command, cwd=model, capture_output=True, text=True, timeout=HUNG, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    log = (model / "run" / "round-0" / "train.log").read_text()
    (scores,) = (line.partition("scores by step: ")[2] for line in log.splitlines() if "scores by step: " in line)
    assert len(scores.split(", ")) == 4
    merged = json.loads((model / "run" / "round-0" / "merged.json").read_text())
    sft = json.loads((model / "run" / "round-0" / "sft.json").read_text())
    assert 0 < merged["to base"]["moved"] < sft["to base"]["moved"]
    assert set(sft["sums"]) >= {"accuracy", "pass@1", "pass@2", "ece"}
    rows = [json.loads(line) for line in (model / "run" / "round-0" / "data").read_text().splitlines()]
    assert rows
    assert {f"{row['prompt']}{row['completion']}" for row in rows} <= {f"Q: {q}\nA: {a}\n" for q, a in SUMS}


def test_the_pull_halves_a_steady_drift() -> None:
    import controls

    network = torch.nn.Linear(3, 2)
    begin = [each.detach().clone() for each in network.parameters()]
    pull = controls.PullToStart()
    state = transformers.TrainerState(max_steps=400)
    pull.on_train_begin(None, state, None, model=network)
    for _ in range(state.max_steps):
        with torch.no_grad():
            for each in network.parameters():
                each.add_(0.01)
        pull.on_step_end(None, state, None, model=network)
    for each, start in zip(network.parameters(), begin, strict=True):
        assert (each - start).mean().item() == pytest.approx(4 / 2, rel=0.01)


def test_no_question_is_trained_on_and_tested(tmp_path: Path) -> None:
    problems = [
        {
            "Body": f"Tom has {number} pens and finds {number + 7}.",
            "Question": "How many now?",
            "Answer": 2.0 * number + 7,
        }
        for number in range(3, 300)
    ]
    (tmp_path / "SVAMP.json").write_text(json.dumps(problems))
    asked = {"stem": "Where?", "choices": [{"label": label, "text": f"place {label}"} for label in "ABCDE"]}
    (tmp_path / "CommonsenseQA.jsonl").write_text(f"{json.dumps({'question': asked, 'answerKey': 'C'})}\n" * 250)
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 9000)
    run("tasks.py", "--output", "out", "--word-problems", tmp_path, "--text", tmp_path / "book.txt", folder=tmp_path)
    files = {
        path.relative_to(tmp_path / "out").with_suffix("").as_posix(): path
        for path in (tmp_path / "out").rglob("*.jsonl")
    }
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    sets = {name: {row["question"] for row in found if not row.get("example")} for name, found in rows.items()}
    assert {name: len(found) for name, found in sets.items() if "sums" in name or name == "train"} == {
        "sums": 460, "held-out/sums": 100, "train": 500,
    }  # fmt: skip
    assert not sets["train"] & (sets["sums"] | sets["held-out/sums"])
    for name in sets:
        if f"held-out/{name}" in sets:
            assert not sets[name] & sets[f"held-out/{name}"]
            assert [row for row in rows[name] if row.get("example")] == [
                r for r in rows[f"held-out/{name}"] if r.get("example")
            ]
    for row in rows["sums"]:
        left, right = map(int, row["question"].split(" + "))
        assert left + right == int(row["answer"])
    assert rows["problems"][0]["answer"] in rows["problems"][0]["choices"]
    assert rows["choices"][0]["answer"] == "place C"


def test_intervals_of_differences() -> None:
    import evidence

    assert [evidence.t95(freedom) for freedom in (2, 5, 30, 1e6)] == pytest.approx(
        [4.303, 2.571, 2.042, 1.960], abs=3e-3
    )
    bits = ("1100110011", "1110111011", "1000110011")
    tests = [{"sums": {"right": each}, "last": {"right": each[::-1]}} for each in bits]
    results: dict[str, Any] = {
        "arms": {"imm": {"label": "IMM"}},
        "base": {"sums": {"right": "1000100010"}, "last": {"right": "0100010001"}},
        "seeds": {str(seed): {"arms": {"imm": {"test": test}}} for seed, test in enumerate(tests)},
    }
    found = evidence.difference(results, "imm", "base", ["sums"])
    by_seed = [30.0, 50.0, 20.0]
    assert found.mean == pytest.approx(sum(by_seed) / 3)
    # each question: the mean over the seeds of how much more it is answered
    each = [100 * (sum(int(b[at]) for b in bits) / 3 - int("1000100010"[at])) for at in range(10)]
    middle = sum(each) / 10
    of_questions = sum((value - middle) ** 2 for value in each) / 9 / 10
    of_seeds = sum((value - found.mean) ** 2 for value in by_seed) / 2 / 3
    freedom = (of_seeds + of_questions) ** 2 / (of_seeds**2 / 2 + of_questions**2 / 9)
    assert found.half == pytest.approx(evidence.t95(freedom) * math.sqrt(of_seeds + of_questions))


def test_differences_are_those_of_seeds_that_have_both_arms() -> None:
    import evidence

    def arm(right: str) -> dict[str, Any]:
        return {"test": {"sums": {"right": right}}}

    results: dict[str, Any] = {
        "arms": {"star": {"label": "STaR"}, "imm": {"label": "IMM"}, "low-lr": {"label": "lr / 5"}},
        "base": {"sums": {"right": "1000"}},
        "seeds": {
            "0": {"arms": {"star": arm("1100"), "imm": arm("1111")}},
            "1": {"arms": {"star": arm("0000")}},
            "2": {"arms": {"star": arm("1110"), "imm": arm("1110")}},
        },
    }
    assert evidence.difference(results, "star", "base", ["sums"]).mean == pytest.approx((25 - 25 + 50) / 3)
    assert evidence.difference(results, "imm", "star", ["sums"]).mean == pytest.approx((50 + 0) / 2)
    assert list(evidence.labels(results)) == ["star", "imm"]  # what no seed has is not shown

    del results["seeds"]["2"]
    one = evidence.difference(results, "imm", "star", ["sums"])
    assert str(one) == "+50.0"  # one seed does not tell how much seeds differ
    assert str(evidence.difference(results, "imm", "low-lr", ["sums"])) == ""


def test_alphas_that_were_tried() -> None:
    import evidence

    def at(inside: float, out: float) -> dict[str, float]:
        return {"mean.in": inside, "mean.out": out}

    base = at(40, 50)
    both = {"base": base, "0/sft": at(60, 30), "0/alpha-0.2": at(62, 40), "0/alpha-0.6": at(60, 28)}
    more = {
        "base": base,
        "0/sft": at(70, 20),
        "0/alpha-0.2": at(64, 44),
        "1/sft": at(75, 10),
        "1/alpha-0.2": at(80, 20),
    }
    chosen = [{"alphas": {"0": 0.6}, "held-out": both}, {"alphas": {"0": 0.2, "1": 0.2}, "held-out": more}]
    results: dict[str, Any] = {
        "rounds": 2,
        "seeds": {str(seed): {"arms": {"chosen": one}} for seed, one in enumerate(chosen)},
    }
    assert evidence.alphas_table(results).splitlines()[2:] == [
        "| 0: before the merge | 65.0 | 25.0 | 75.0 | 10.0 |",
        "| 0.2 | 63.0 | 42.0 (1) | 80.0 | 20.0 (1) |",
        "| 0.6 | 60.0 | 28.0 (1) |  |  |",  # the second seed did not try it, and only that one went on
        "| 1: the base | 40.0 | 50.0 | 40.0 | 50.0 |",
    ]
    assert evidence.beaten_table(results | {"rounds": 1, "seeds": {"0": results["seeds"]["0"]}}).splitlines()[2:] == [
        "| in domain | 0.2 | 1 | 0 | 0 |",
        "| in domain | 0.6 | 0 | 1 | 0 |",
        "| out of domain | 0.2 | 1 | 0 | 0 |",
        "| out of domain | 0.6 | 0 | 0 | 1 |",
    ]
