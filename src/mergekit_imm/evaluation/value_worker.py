"""The process in which math-verify compares expressions; `by_value` starts it as a script, and asks it line by line.

A question is a line with a JSON list of two TeX expressions, its answer a line: "same" or "other".
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys

SECONDS = 3.0  # processor time for a question; then the kernel ends the process, even inside a long multiplication
MEMORY = 4 << 30  # bytes of address space


def main() -> None:
    """Answer questions until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints can pass for an answer
    logging.disable(logging.CRITICAL)
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # Without the removal of units, which takes `ab` of `5ab` for one.
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="all")
    )

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def read(tex: str) -> list[object]:
        found: list[object] = parse(f"\\boxed{{{tex}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
        return found

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        same = False
        with contextlib.suppress(Exception):
            one, other = map(read, json.loads(line))
            same = any(verify(gold, given, timeout_seconds=None) for gold, given in ((one, other), (other, one)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("same" if same else "other", file=answers, flush=True)


if __name__ == "__main__":
    main()
