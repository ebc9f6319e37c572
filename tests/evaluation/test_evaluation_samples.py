"""Samples of models: reading, refusals, comparisons, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mergekit_imm import ArgumentError, CheckpointError, ExtraError, MergeError, MismatchError
from mergekit_imm.cli.samples import samples_command
from mergekit_imm.evaluation import Report, read_samples
from mergekit_imm.evaluation.comparison import compare
from mergekit_imm.views.samples import FILES, pictures, table

Line = dict[str, Any]
WITHOUT_CONFIDENCES = sorted(name for name in FILES if not name.startswith("calibration."))
GOOD = {"problem": "p", "response": "r", "correct": True}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, lines: list[Line]) -> str:
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


def made(model: str, right: list[int], samples: int = 4, greedy: bool = True) -> list[Line]:
    """Lines with `right[i]` right samples of problem i; the greedy answer is right if half of them are."""
    lines: list[Line] = []
    for number, count in enumerate(right):
        common = {"problem": f"q{number}", "model": model}
        texts = [
            f"{model} says {i if model == 'a' else 0} and so on, 1 + {number} = {1 + number}" for i in range(samples)
        ]
        lines += [{**common, "response": text, "correct": i < count} for i, text in enumerate(texts)]
        if greedy:
            lines.append({**common, "response": "greedy", "correct": 2 * count >= samples, "greedy": True})
    return lines


def report(*models: list[Line], **options: Any) -> Report:
    files = [write(f"f{number}.jsonl", lines) for number, lines in enumerate(models)]
    return compare(read_samples(files), resamples=100, **options)


def test_read_samples() -> None:
    write("base.jsonl", [GOOD, {**GOOD, "greedy": True, "extra": 1, "response": "g"}, {**GOOD, "correct": False}])
    with Path("base.jsonl").open("a") as file:
        file.write("\n\n")
    (model,) = read_samples(["base.jsonl"])
    problem = model.problems["p"]
    assert (model.name, problem.counts, problem.level, problem.ood) == ("base", (2, 1), None, False)
    assert problem.greedy is not None
    assert problem.greedy.text == "g"


def test_answers_are_judged() -> None:
    lines = [{"problem": "p", "response": f"it is {given}", "answer": answer} for given, answer in ((7, "7"), (7, 7.0))]
    lines += [{"problem": "q", "response": r"\boxed{\frac{1}{\sqrt{2}}}", "answer": r"\frac{\sqrt2}{2}"}]
    lines += [{"problem": "q", "response": "it is 2", "answer": r"\frac{\sqrt2}{2}"}]
    problems = read_samples([write("a.jsonl", lines)])[0].problems
    assert (problems["p"].counts, problems["q"].counts) == ((2, 2), (2, 1))


def test_a_response_is_judged_up_to_the_next_question() -> None:
    line = {"problem": "p", "response": "#### 7\n\nQuestion: 2 + 2?\n#### 4", "answer": "7"}
    path = write("a.jsonl", [line, {**line, "answer": "7.0", "response": "#### 7"}])
    assert read_samples([path])[0].problems["p"].counts == (2, 2)
    assert read_samples([path], cut=False)[0].problems["p"].counts == (2, 1)


def test_a_problem_with_two_right_answers_is_refused() -> None:
    line = {"problem": "p", "response": "7", "answer": "7"}
    first = write("a.jsonl", [line, {**line, "answer": "7.00"}])
    with pytest.raises(MismatchError, match=r"problem 'p' has the answer '7' in a.jsonl, line 1, but '8' in b.jsonl"):
        read_samples([first, write("b.jsonl", [{**line, "answer": 8}])])


def test_answers_need_the_judge_and_verdicts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    read_samples([write("a.jsonl", [GOOD])])
    with pytest.raises(ExtraError, match=r"Judging answers needs math-verify.*pip install 'math-verify>=0.8'"):
        read_samples([write("b.jsonl", [{"problem": "p", "response": "7", "answer": "7"}])])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl, line 2: not JSON"),
        ("[1]", "a.jsonl, line 2: not an object"),
        ('{"problem": "p", "problem": "p"}', "appears twice"),
        ({"response": "r", "correct": True}, "line 2: problem is missing"),
        ({"problem": "p", "correct": True}, "line 2: response is missing"),
        ({"problem": "p", "response": "r"}, 'line 2: no verdict; give "correct", true or false, or "answer"'),
        ({**GOOD, "correct": 1}, "line 2: correct is 1; it must be true or false"),
        ({**GOOD, "correct": None}, "line 2: correct is None; it must be true or false"),
        ({**GOOD, "level": "3"}, "line 2: level is '3'; it must be an integer"),
        ({**GOOD, "problem": 3}, "line 2: problem is 3; it must be a string"),
        ({**GOOD, "corect": True}, "the key 'corect' looks like 'correct'"),
        ({**GOOD, "Greedy": True}, "the key 'Greedy' looks like 'greedy'"),
        ({**GOOD, "odd": True}, "the key 'odd' looks like 'ood'"),
        ({"problem": "p", "response": "r", "answer": float("inf")}, 'no verdict; give "correct"'),
    ],
)
def test_invalid_lines_are_refused(line: str | Line, message: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    Path("a.jsonl").write_text(json.dumps(GOOD) + "\n" + text + "\n")
    with pytest.raises(CheckpointError) as caught:
        read_samples(["a.jsonl"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, {**GOOD, "level": 2}], r"has level None in a.jsonl, line 1, but 2 in a.jsonl, line 2"),
        ([GOOD, {**GOOD, "ood": True}], r"has ood False in a.jsonl, line 1, but True"),
        ([{**GOOD, "greedy": True}] * 2, r"two greedy answers of one model, in a.jsonl, line 1 and a.jsonl, line 2"),
    ],
)
def test_contradicting_lines_are_refused(lines: list[Line], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        read_samples([write("a.jsonl", lines)])


def test_invalid_files_are_refused() -> None:
    Path("one").mkdir()
    write("a.jsonl", [GOOD])
    write("one/a.jsonl", [GOOD])
    Path("empty.jsonl").write_text("\n")
    cases: list[tuple[list[str], type[MergeError], str]] = [
        ([], ArgumentError, "paths is empty"),
        (["none.jsonl"], CheckpointError, "none.jsonl cannot be read: No such file"),
        (["one"], CheckpointError, "one cannot be read: it is not a plain file"),
        (["empty.jsonl"], CheckpointError, "are empty"),
        (["a.jsonl", "./a.jsonl"], ArgumentError, "given twice"),
        (["a.jsonl", "one/a.jsonl"], MismatchError, "both be the model 'a'"),
    ]
    for files, kind, message in cases:
        with pytest.raises(kind, match=message):
            read_samples(files)


def test_mismatched_models_are_refused() -> None:
    with pytest.raises(
        MismatchError, match=r"'b' lacks 2 of the 3 problems of 'a': 'q1', 'q2'; give all models the same"
    ):
        report(made("a", [1, 2, 3]), made("b", [1]))
    with pytest.raises(MismatchError, match=r"'a' lacks 1 of the 2 problems of 'b': 'q1'"):
        report(made("a", [1]), made("b", [1, 2]))
    with pytest.raises(ArgumentError, match="reference is 'c'; it must be one of a, b"):
        report(made("a", [1]), made("b", [1]), reference="c")
    with pytest.raises(MismatchError, match="all problems are marked ood"):
        report([{**GOOD, "ood": True}])
    with pytest.raises(
        MismatchError, match="problem 'p' has level 1 and ood False in 'a', level 2 and ood False in 'b'"
    ):
        report([{**GOOD, "model": "a", "level": 1}], [{**GOOD, "model": "b", "level": 2}])
    for rows, message in (
        ([[1.0, 2.0]], r"shape \(1, 2\); it must be \(4, width\)"),
        ([[1.0], [0.0], [1.0], [1.0]], "zero vector for 'a says 1 and so on, 1 [+] 0 = 1'"),
        ([[1.0], [1.0, 2.0]], "did not return an array of numbers"),
        ([["a"]] * 4, "did not return an array of numbers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            report(made("a", [1]), encoder=lambda _, rows=rows: rows)


def test_a_comparison_by_hand() -> None:
    before, after = [0, 1, 2, 3, 1, 1, 0, 2], [4, 4, 4, 4, 4, 4, 0, 1]
    (found,) = report(made("a", before), made("b", after)).comparisons
    values = {m.name: (m.reference.value, m.model.value, m.difference.value) for m in found.measures}
    assert values["pass@1 (greedy)"] == pytest.approx((3 / 8, 6 / 8, 3 / 8))
    assert values["pass@1 (sampled)"] == pytest.approx((sum(before) / 32, sum(after) / 32, 15 / 32))
    assert values["pass@4 (sampled)"] == pytest.approx((6 / 8, 7 / 8, 1 / 8))
    assert found.gained is not None
    assert found.lost is not None
    assert (found.gained.problems, found.lost.problems) == (4, 1)  # q0, q1, q4, q5; q7
    assert found.gained.reference[1].value == pytest.approx((0 + 1 + 1 + 1) / 16)
    assert found.gained.reference[4].value == pytest.approx(3 / 4)
    assert found.lost.model[1].value == pytest.approx(1 / 4)
    correct = {m.name: m for m in found.measures if m.name.endswith(", correct")}
    assert correct["EAD, correct"].difference.n == 2  # q2, q3: two right samples of both
    assert any("diversity, correct: on 2 of 8 problems" in note for note in found.notes)
    # b is cut to as many responses as a has, 2 and 3, all alike: 1 of 2 and 1 of 3 n-grams are distinct
    assert correct["distinct-n, correct"].model.value < correct["distinct-n, correct"].reference.value
    assert correct["distinct equations, correct"].model.value == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert correct["tokens, correct"].difference.value == 0
    vocabulary = {
        word for m in "ab" for line in made(m, before) if not line.get("greedy") for word in line["response"].split()
    }
    v, words = len(vocabulary), 11  # of each response; of b all are the same, of which 9 or 10 words are distinct
    texts = [f"b says 0 and so on, 1 + {q} = {q + 1}".split() for q in (2, 3)]
    ead = [len(set(t)) / (v * (1 - ((v - 1) / v) ** (words * n))) for t, n in zip(texts, (2, 3), strict=True)]
    assert correct["EAD, correct"].model.value == pytest.approx(sum(ead) / 2)


def test_ood_levels_and_encoder() -> None:
    ood = [
        {
            "problem": f"o{i}",
            "model": m,
            "response": "r",
            "correct": (i % 4 < 2 if m == "a" else i % 2 == 0),
            "ood": True,
            "level": 1 + 4 * (i % 2),
            "greedy": True,
        }
        for m in "ab"
        for i in range(12)
    ]
    lines = [made("a", [2] * 8), made("b", [4] * 8)]
    encoder = lambda texts: [[1.0, int(t.split()[2]) * (int(t.split()[8]) + 1.0)] for t in texts]  # noqa: E731
    (found,) = report(*lines, ood, encoder=encoder).comparisons
    named = {m.name: m for m in found.measures}
    assert named["OOD pass@1 (greedy)"].reference.value == 0.5
    assert named["OOD group disparity (greedy)"].reference.value == 0.0
    assert named["OOD group disparity (greedy)"].model.value == 1.0
    by_hand = [1 - (1 + (q + 1) ** 2) ** -0.5 for q in range(8)]  # of (1, 0) and (1, q + 1), the right ones of a
    assert named["cosine diversity, correct"].reference.value == pytest.approx(sum(by_hand) / 8)
    assert named["cosine diversity, correct"].model.value == pytest.approx(0)
    assert found.verdict.diversity_fell
    assert found.verdict.disparity_rose
    assert found.verdict.evidence["diversity"] == named["cosine diversity, correct"].difference


def test_missing_measures_are_noted() -> None:
    (found,) = report(made("a", [1, 2], greedy=False), made("b", [3, 4], samples=5)).comparisons
    assert found.gained is None
    assert found.measures[0].name == "pass@1 (sampled)"
    assert [m.name for m in found.measures if m.name.startswith("pass@")][-1] == "pass@4 (sampled)"
    assert any("2 greedy answers are missing, first that of 'a' to 'q0'" in note for note in found.notes)
    (found,) = report(made("a", [0, 0], samples=0), made("b", [0, 0], samples=0)).comparisons
    assert any("pass@k and diversity are not measured" in note for note in found.notes)
    assert [m.name for m in found.measures] == ["pass@1 (greedy)"]


def test_report_is_plain_data_and_figures_are_reproducible() -> None:
    found = report(made("a", [0, 1, 2, 3, 2, 2, 1]), made("b $x$", [4, 4, 4, 4, 0, 0, 4]))
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["comparisons"][0]["measures"][0]["difference"]["n"] == 7
    assert list(plain["pass_at_k"]["a"]) == ["1", "2", "4"]
    drawn = pictures(found)
    assert sorted(["samples.json", *drawn]) == WITHOUT_CONFIDENCES
    assert drawn == pictures(found)
    assert drawn["pass-at-k.png"][:4] == b"\x89PNG"
    alone = report(made("a", [0, 1]))
    assert "nothing to compare it with" in table(alone)
    assert sorted(pictures(alone)) == ["pass-at-k.png", "pass-at-k.svg"]


def run(*arguments: str) -> str:
    return CliRunner().invoke(samples_command, arguments, catch_exceptions=False, standalone_mode=False).output


def test_the_command() -> None:
    files = (write("f.jsonl", made("a", [2] * 8)), write("g.jsonl", made("b", [4] * 8)))
    printed = run(*files, "-o", "out/deep")
    assert "b against a" in printed
    assert "written to out/deep/samples.json" in printed
    assert sorted(path.name for path in Path("out/deep").iterdir()) == WITHOUT_CONFIDENCES
    before = Path("out/deep/samples.json").read_bytes()
    assert run(*files, "-o", "out/deep", "-q").startswith("b: ")  # our own files are replaced
    assert Path("out/deep/samples.json").read_bytes() == before
    assert json.loads(run(*files, "--json", "--reference", "b"))["reference"] == "b"
    Path("other").mkdir()
    Path("other/differences.png").write_text("mine")
    with pytest.raises(MergeError, match=r"other/differences.png exists and is not of this command"):
        run(*files, "-o", "other")
    with pytest.raises(MergeError, match=r"f.jsonl is not a folder"):
        run(*files, "-o", "f.jsonl")


def test_encoders_of_the_command() -> None:
    file = write("f.jsonl", made("a", [2] * 2))
    Path("my_encoder_of_tests.py").write_text(
        "def encode(texts): return [[1.0, len(t)] for t in texts]\ndef broken(texts): raise ValueError('no')\n"
    )
    assert "pass@4" in run(file, "--encoder", "my_encoder_of_tests:encode")
    for name, message in (
        ("no_such_module_here:f", "no_such_module_here cannot be imported"),
        ("my_encoder_of_tests:nothing", "has no function 'nothing'"),
        ("my_encoder_of_tests:broken", "^encoder my_encoder_of_tests:broken failed: ValueError: no"),
    ):
        with pytest.raises(ArgumentError, match=message):
            run(file, "--encoder", name)
    with pytest.raises(click.UsageError, match="is not MODULE:FUNCTION"):
        run(file, "--encoder", "encode")
    assert str(Path.cwd()) not in sys.path
