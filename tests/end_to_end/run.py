"""Draw situations on and on, and write down each kind of failure: `python -m end_to_end.run --minutes 60 --seed 1`.

`--json FILE` runs those of a file instead, one a line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import torch

from .judge import Failure, Verdict, judged
from .situations import Situation, from_json, simpler, situations, to_json

_TRIES = 60  # to make a failing situation plainer


def tried(situation: Situation) -> Verdict:
    """Judge a situation in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="end-to-end-"))
    try:
        return judged(situation, folder)
    except Exception as error:  # of the test itself; written down like the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} in {Path(where.filename).name}, {where.name}: {error}"
        return Verdict("failed", Failure("error of the test", 0, "a verdict", text[:300]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plainest(situation: Situation, kind: str, until: float) -> tuple[Situation, Verdict]:
    """Make a failing situation plainer as long as it fails alike."""
    verdict = tried(situation)
    tries = 0
    changed = True
    while changed and tries < _TRIES and time.monotonic() < until:
        changed = False
        for other in simpler(situation):
            tries += 1
            found = tried(other)
            if found.failure is not None and found.failure.kind == kind:
                situation, verdict, changed = other, found, True
                break
            if tries >= _TRIES or time.monotonic() > until:
                break
    return situation, verdict


def kinds_of(situation: Situation) -> list[str]:
    """What a situation has, to be counted."""
    found = [f"architecture {situation.architecture}", f"ends {situation.ends}", f"base {situation.base.form}"]
    found += [f"rounds {len(situation.rounds)}"] + [f"beside {situation.beside}"] * bool(situation.beside)
    found += ["command"] * situation.by_command
    for each in situation.rounds:
        found += ["sft adapter" if each.adapter else f"sft {each.sft.form}"]
        found += [f"sft ends {each.ends}"] if each.adapter is None else []
        found += [f"rows, vocab {each.vocab}"] if each.rows else []
        found += [f"part {each.part}"] if each.part else []
    return found


def main() -> int:
    """Run."""
    parser = argparse.ArgumentParser(prog="python -m end_to_end.run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("failures.jsonl"))
    parser.add_argument("--json", type=Path, help="run the situations of this file, one a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.json:
        return _again(options.json)
    end = time.monotonic() + 60 * options.minutes
    outcomes, kinds, failures = Counter[str](), Counter[str](), Counter[str]()

    def judge(situation: Situation) -> None:
        if time.monotonic() > end:
            return
        verdict = tried(situation)
        outcomes[re.sub(r"'[^']*'|`[^`]*`|[\[{].*|\d+", "_", verdict.outcome)[:100]] += 1
        kinds.update(kinds_of(situation))
        if verdict.failure is None:
            return
        kind = verdict.failure.kind
        failures[kind] += 1
        if failures[kind] > 1:
            return
        plain, found = plainest(situation, kind, end)
        failure = found.failure or verdict.failure
        line = {"kind": kind, "expected": failure.expected, "came": failure.came, "round": failure.number}
        with options.failures.open("a") as file:
            file.write(json.dumps({**line, "situation": json.loads(to_json(plain))}) + "\n")
        print(f"{kind}\n    expected {failure.expected}\n    came     {failure.came}\n    {to_json(plain)}", flush=True)

    batch = 0
    while time.monotonic() < end:
        run = hypothesis.given(situations())(judge)
        run = hypothesis.settings(
            max_examples=100,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )(run)
        hypothesis.seed(options.seed * 100_000 + batch)(run)()
        batch += 1
    for title, counts in (("outcomes", outcomes), ("situations", kinds), ("failures", failures)):
        print(f"\n{title}")
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            print(f"{count:7}  {name}")
    return 1 if failures else 0


def _again(file: Path) -> int:
    failed = 0
    for line in filter(None, file.read_text().splitlines()):
        given = json.loads(line)
        verdict = tried(from_json(json.dumps(given.get("situation", given))))
        failed += verdict.failure is not None
        print(verdict.outcome, verdict.failure or verdict.known or "", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
