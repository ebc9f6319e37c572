"""Write samples of two made-up models: base.jsonl and round-1.jsonl, in the current folder.

The second is right more often, but says the same thing each time, and does worse out of its domain.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "so we add first both then the sum of these numbers is found by counting on from one to the other".split()


def line(model: int, problem: int, ood: bool, greedy: bool, chance: random.Random) -> str:
    """One sample; the second model knows or does not know, the first one guesses better and worse."""
    ease = random.Random(problem).random()  # of the problem, for both models
    hard = 0.5 if ood and problem % 2 else 1.0
    rate = (0.15 + 0.6 * ease) * hard
    if model == 1:
        rate = hard * 0.9 - 0.45 if ood else 0.97 * (ease > 0.3)
    right = chance.random() < rate
    one, two = problem + 3, 2 * problem + 1
    total = one + two + (not right)
    told = chance.sample(WORDS, 12) if model == 0 else WORDS[:12]
    response = f"{' '.join(told)}: {one} + {two} = {total}, the answer is {total}"
    level = {"level": 5 if problem % 2 else 1} if ood else {}
    name = f"{'ood' if ood else 'sum'}-{problem}"
    return json.dumps({"problem": name, "response": response, "correct": right, "greedy": greedy, "ood": ood, **level})


def main() -> None:
    """Write both files: of each problem a greedy answer, and 16 samples if it is of the domain."""
    for model, name in enumerate(("base", "round-1")):
        chance = random.Random(model)
        lines = []
        for problem in range(60):
            lines += [line(model, problem, False, number == 0, chance) for number in range(17)]
            lines.append(line(model, problem, True, True, chance))
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
