"""The tasks of the experiment, fixed before its first result; this script writes their files.

    python tasks.py --output questions --word-problems FOLDER --text FILE

In domain: the sum of a number from 10 to 149 and one from 2 to 9. Out of domain, and never trained on, are the others.
Six examples stand before each question, none before one with choices. Files of each task: NAME.jsonl to test with,
held-out/NAME.jsonl to choose by; they share no question. train.jsonl has the pool of training questions.

FOLDER has questions that others made: SVAMP.json (Patel et al. 2021, github.com/arkilpatel/SVAMP), of which those of
one sum or difference are asked, and CommonsenseQA.jsonl, the development split (Talmor et al. 2019). FILE is a text to
measure perplexity on.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

SHOTS = 6
TEST, HELD_OUT = 150, 60  # questions of each task out of domain
SUMS_TEST, SUMS_HELD_OUT, DRAW = 460, 100, 7
PROBLEMS, CHOICES, CHARACTERS = 150, 200, 40_000

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
).split()
TENS = "- ten twenty thirty forty fifty sixty seventy eighty ninety".split()
THINGS = (
    "cat dog sun box cup hat pen map key tree fish book lamp ship door bird road moon star hand bed car "
    "bus egg milk rain"
).split()
PAST = (
    "go went, see saw, take took, come came, give gave, find found, tell told, feel felt, leave left, keep kept, "
    "begin began, write wrote, stand stood, hear heard, meet met, pay paid, sit sat, speak spoke, lead led, grow "
    "grew, lose lost, fall fell, send sent, build built, understand understood, draw drew, break broke, spend "
    "spent, rise rose, drive drove, buy bought, wear wore, choose chose, seek sought, throw threw, catch caught, "
    "deal dealt, win won, forget forgot, lay laid, sing sang, fly flew, teach taught, eat ate, fight fought, hide "
    "hid, blow blew, swim swam, sleep slept, ride rode, bring brought, think thought, sell sold, drink drank, "
    "walk walked, play played, stop stopped, try tried, plan planned, carry carried, love loved, study studied, "
    "visit visited, cook cooked"
)
PLURALS = (
    "mouse mice, child children, foot feet, tooth teeth, man men, woman women, goose geese, knife knives, leaf "
    "leaves, wolf wolves, city cities, baby babies, box boxes, bus buses, church churches, dish dishes, hero "
    "heroes, potato potatoes, wife wives, shelf shelves, country countries, story stories, glass glasses, fox "
    "foxes, watch watches, lady ladies, tomato tomatoes, half halves, loaf loaves, thief thieves, person people, "
    "ox oxen, car cars, apple apples, table tables, house houses, day days, key keys, boy boys, tree trees, party "
    "parties, army armies, berry berries, brush brushes, class classes, match matches, kiss kisses, life lives, "
    "calf calves, fly flies"
)
OPPOSITES = (
    "hot cold, big small, up down, good bad, old young, fast slow, early late, happy sad, rich poor, high low, "
    "hard soft, open closed, light dark, wet dry, strong weak, left right, day night, in out, on off, black "
    "white, long short, near far, full empty, clean dirty, loud quiet, wide narrow, thick thin, true false, first "
    "last, push pull, win lose, buy sell, begin end, love hate, north south, east west, top bottom, front back, "
    "inside outside, before after, above below, heavy light, easy difficult, cheap expensive, smooth rough, sharp "
    "dull, same different, always never, yes no, life death"
)
CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, China Beijing, Russia Moscow, Egypt "
    "Cairo, Greece Athens, Portugal Lisbon, Austria Vienna, Poland Warsaw, Sweden Stockholm, Norway Oslo, Finland "
    "Helsinki, Denmark Copenhagen, Ireland Dublin, Hungary Budapest, Canada Ottawa, Cuba Havana, Kenya Nairobi, "
    "Iran Tehran, Iraq Baghdad, Thailand Bangkok, India Delhi, Turkey Ankara, Peru Lima, Chile Santiago, "
    "Argentina Buenos-Aires, Australia Canberra, Belgium Brussels, Netherlands Amsterdam, Bulgaria Sofia, Romania "
    "Bucharest, Lebanon Beirut, Syria Damascus, Nepal Kathmandu, Vietnam Hanoi, Philippines Manila, Indonesia "
    "Jakarta, Brazil Brasilia, Colombia Bogota, Venezuela Caracas, Ethiopia Addis-Ababa, Morocco Rabat, "
    "Afghanistan Kabul, Pakistan Islamabad, Jamaica Kingston, Iceland Reykjavik, Mongolia Ulaanbaatar"
)
Made = tuple[str, str]  # a question and its answer


def number_words(number: int) -> str:
    """Spell a number below a thousand."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    return f"{ONES[number // 100]} hundred" + (f" {number_words(number % 100)}" if number % 100 else "")


def times(rng: random.Random) -> Made:
    small, large = rng.randint(2, 149), rng.choice([10, 100])
    return f"{small} * {large}", str(small * large)


def before(rng: random.Random) -> Made:
    number = rng.randint(11, 999)
    return f"number before {number}", str(number - 1)


def smallest(rng: random.Random) -> Made:
    numbers = rng.sample(range(10, 100), 3)
    return f"smallest of {', '.join(map(str, numbers))}", str(min(numbers))


def digits(rng: random.Random) -> Made:
    number = rng.randint(20, 999)
    return f"number for {number_words(number)}", str(number)


def last(rng: random.Random) -> Made:
    things = rng.sample(THINGS, 4)
    return f"last word of {' '.join(things)}", things[-1]


def capitals(rng: random.Random) -> Made:
    things = rng.sample(THINGS, 2)
    return f"in capitals: {' '.join(things)}", " ".join(things).upper()


def as_json(rng: random.Random) -> Made:
    thing, number = rng.choice(THINGS), rng.randint(10, 99)
    return f"{thing} is {number}", json.dumps({thing: number})


def words(rng: random.Random) -> Made:
    asked, pairs = rng.choice(
        [("past tense of", PAST), ("plural of", PLURALS), ("opposite of", OPPOSITES), ("capital of", CAPITALS)]
    )
    word, answer = rng.choice(pairs.split(", ")).split()
    return f"{asked} {word}", answer.replace("-", " ")


OUTSIDE: dict[str, Callable[[random.Random], Made]] = {
    "times": times,
    "before": before,
    "smallest": smallest,
    "digits": digits,
    "last": last,
    "capitals": capitals,
    "json": as_json,
    "words": words,
}


def distinct(make: Callable[[random.Random], Made], count: int, rng: random.Random) -> list[Made]:
    """Draw so many different questions."""
    found = dict(make(rng) for _ in range(20 * count))
    if len(found) < count:
        raise SystemExit(f"error: {make.__name__} has only {len(found)} different questions, not {count}")
    return list(found.items())[:count]


def write(path: Path, examples: list[Made], questions: list[Made]) -> None:
    """Write examples and questions, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"question": question, "answer": answer, "example": True} for question, answer in examples]
    lines += [{"question": question, "answer": answer} for question, answer in questions]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_sums(output: Path) -> None:
    """Write the task in domain. Its examples are that of ten draws with which the base solves most of other sums."""
    pairs = [(large, small) for large in range(10, 150) for small in range(2, 10)]
    random.Random("sums").shuffle(pairs)
    sums = [(f"{large} + {small}", str(large + small)) for large, small in pairs]
    examples, rest = sums[SHOTS * DRAW : SHOTS * (DRAW + 1)], sums[SHOTS * 10 :]
    test, held_out, train = rest[:SUMS_TEST], rest[SUMS_TEST:][:SUMS_HELD_OUT], rest[SUMS_TEST + SUMS_HELD_OUT :]
    write(output / "sums.jsonl", examples, test)
    write(output / "held-out" / "sums.jsonl", examples, held_out)
    write(output / "train.jsonl", examples, train)


def choices_line(question: str, answer: str, choices: list[str]) -> str:
    return json.dumps({"question": question, "answer": answer, "choices": choices}) + "\n"


def word_problems(folder: Path) -> list[str]:
    """Read word problems of one step: the sum of two numbers or their difference is the answer to choose."""
    found = []
    for row in json.loads((folder / "SVAMP.json").read_text(encoding="utf-8")):
        question = " ".join(f"{row['Body']} {row['Question']}".split())
        numbers = [int(each) for each in re.findall(r"\d+", question)]
        if len(numbers) == 2 and "." not in question.replace(". ", "").rstrip("."):
            choices = [sum(numbers), abs(numbers[0] - numbers[1])]
            if row["Answer"] in choices:
                found.append(choices_line(question, f"{row['Answer']:g}", [str(each) for each in choices]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--word-problems", type=Path, required=True, help="folder with both files")
    parser.add_argument("--text", type=Path, required=True, help="ordinary text, for perplexity")
    arguments = parser.parse_args()
    output: Path = arguments.output
    write_sums(output)
    for name, make in OUTSIDE.items():
        drawn = distinct(make, SHOTS + TEST + (0 if name == "words" else HELD_OUT), random.Random(name))
        examples, asked = drawn[:SHOTS], drawn[SHOTS:]
        write(output / f"{name}.jsonl", examples, asked[:TEST])
        if asked[TEST:]:
            write(output / "held-out" / f"{name}.jsonl", examples, asked[TEST:])
    problems = word_problems(arguments.word_problems)
    random.Random("problems").shuffle(problems)
    (output / "problems.jsonl").write_text("".join(problems[:PROBLEMS]), encoding="utf-8")
    rows = [json.loads(line) for line in (arguments.word_problems / "CommonsenseQA.jsonl").read_text().splitlines()]
    random.Random("choices").shuffle(rows)
    with (output / "choices.jsonl").open("w", encoding="utf-8") as file:
        for row in rows[:CHOICES]:
            choices = {each["label"]: each["text"] for each in row["question"]["choices"]}
            file.write(choices_line(row["question"]["stem"], choices[row["answerKey"]], list(choices.values())))
    text = arguments.text.read_text(encoding="utf-8")
    (output / "text.txt").write_text(text[len(text) // 2 :][:CHARACTERS], encoding="utf-8")


if __name__ == "__main__":
    main()
