"""Run the user's commands in /bin/sh: fill in placeholders, show and log the output."""

from __future__ import annotations

import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..common.messages import shown
from ..errors import ArgumentError, MergeError

Echo = Callable[[bytes], None]

LAST_LINES = 20
GRACE = 20.0  # seconds between the first signal to a command and SIGKILL
_CLOSE = 0.8  # difflib cutoff: modle, outputs, bse are close; date and name are not


class CommandError(MergeError):
    """A user's command failed. `status`: exit status, 128 + the number of a fatal signal; `lines`: its last lines."""

    def __init__(self, message: str, status: int, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status, self.lines = status, tuple(lines)


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return a command with its placeholders filled in, each quoted as one shell word; other braces stay, `${x}` too.

    Raises ArgumentError for a placeholder inside quotes if its value needs quotes itself.

    >>> filled("train {model} -o {output} '{x: 1}'", {"model": "a b", "output": "out"})
    "train 'a b' -o out '{x: 1}'"
    """
    found, at = [], 0
    for word, quote in _braced(template):
        name = word[1]
        if name not in values:
            continue
        value = shlex.quote(values[name])
        if quote and value != values[name]:
            raise ArgumentError(
                f"{{{name}}} is inside {quote} in '{shown(template)}', and its value is {shown(value)}; leave out the"
                " quotes around it: it is quoted when filled in"
            )
        found += [template[at : word.start()], value]
        at = word.end()
    return "".join([*found, template[at:]])


def _braced(template: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield single words in braces, except `${x}`, each with the quote it is inside ('' if none)."""
    quote = ""
    for match in re.finditer(r"\\.|['\"]|(?<!\$)\{([^\W\d]\w*)\}", template, re.DOTALL):
        text = match[0]
        if match[1] is not None:
            yield match, quote
        elif text == "\\'" and quote == "'":  # single quotes have no escapes: the quote ends
            quote = ""
        elif text in ("'", '"') and quote in ("", text):
            quote = "" if quote else text


def placeholders(template: str, names: tuple[str, ...]) -> set[str]:
    """Return which of these placeholders a command has."""
    return {word[1] for word, _ in _braced(template)} & set(names)


def check_placeholders(what: str, template: str, names: Sequence[str], every: Collection[str]) -> None:
    """Raise ArgumentError for a word in braces that looks like a placeholder but is not one of this command's.

    Outside quotes that is any word: to a shell, braces around one word mean nothing. Inside quotes, where programs
    may be (`awk '{print}'`), only a misspelt placeholder or one of another command (`every`). Never `%{x}` or `@{x}`.

    >>> check_placeholders("the train command", "train {modle} {output}", ["model", "output"], ["model", "output"])
    Traceback (most recent call last):
    mergekit_imm.errors.ArgumentError: the train command has {modle}, which is not one of its placeholders {model} \
{output}; did you mean {model}? If it is meant literally, write {m''odle}
    """
    for word, quote in _braced(template):
        name = word[1]
        near = get_close_matches(name.lower(), names, n=1, cutoff=_CLOSE)
        near = near or [each for each in names if sorted(each) == sorted(name.lower())]
        bare = not quote and template[word.start() - 1 : word.start()] not in ("%", "@", "#")
        if name in names or not (near or bare or name in every):
            continue
        did_you = f"did you mean {{{near[0]}}}? If" if near else "if"
        raise ArgumentError(
            f"{what} has {{{shown(name)}}}, which is not one of its placeholders {' '.join(f'{{{n}}}' for n in names)};"
            f" {did_you} it is meant literally, write {{{shown(name[0])}{2 * (quote or chr(39))}{shown(name[1:])}}}"
        )


def run_command(what: str, command: str, log: Path, *, held: int | None, echo: Echo | None, cure: str) -> None:
    """Run a command in /bin/sh; pass its standard output and error to `echo` and append them to a log.

    It inherits the environment and the descriptor `held` (a lock that lasts as long as its processes). Raises
    CommandError with its last lines and the `cure` if it fails. If this process is interrupted, so is the command.
    """
    with log.open("ab") as file:
        file.write(f"$ {command}\n".encode())
        file.flush()
        process: subprocess.Popen[bytes] | None = None
        last: deque[bytes] = deque(maxlen=LAST_LINES)
        try:
            with _deferred_signals():
                process = subprocess.Popen(
                    ["/bin/sh", "-c", command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=() if held is None else (held,),
                    start_new_session=True,
                )
            _copy_output(process, file.write, last, echo)
        except BaseException as error:
            if process is not None:
                with _deferred_signals():
                    _terminate(process, error)
                    file.flush()
            raise
        finally:
            if process is not None and process.stdout is not None:
                process.stdout.close()
        file.write(f"(status {process.returncode})\n".encode())
    if process.returncode:
        status = process.returncode if process.returncode > 0 else 128 - process.returncode
        lines = [line for line in (each.decode(errors="replace").strip() for each in last) if line]
        last_line = f"; its last line: {shown(lines[-1], 300)}" if lines else ""
        raise CommandError(
            f"{what} ended with status {status}{last_line}; its output is in {shown(log, 300)}; {cure}",
            status,
            lines,
        )


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defer signals to the end of the block, so that a command just started is known to the code that ends it."""
    received: list[int] = []
    before: dict[int, Any] = {}
    try:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(each)
            if callable(handler) and threading.current_thread() is threading.main_thread():
                before[each] = handler
                signal.signal(each, lambda number, _: received.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def _copy_output(
    process: subprocess.Popen[bytes], write: Callable[[bytes], object], last: deque[bytes], echo: Echo | None
) -> None:
    """Read a command's output until it ends; do not wait for background processes it left."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    rest = b""
    while True:
        ended = process.poll() is not None
        ready, _, _ = select.select([descriptor], [], [], 0 if ended else 0.2)
        if not ready:
            if ended:
                break
            continue
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            process.wait()
            break
        write(piece)
        if echo is not None:
            echo(piece)
        *lines, rest = re.split(rb"[\r\n]+", rest + piece)
        rest = rest[-(1 << 16) :]
        last.extend(lines)
    last.append(rest)


def _terminate(process: subprocess.Popen[bytes], error: BaseException) -> None:
    """Forward the signal that ended this process to a command's process group; SIGKILL it after GRACE seconds."""
    number = error.args[0] if error.args and error.args[0] in (signal.SIGINT, signal.SIGTERM) else signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    for each, patience in ((number, GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, each)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def to_stdout(piece: bytes) -> None:
    """Write output of a command to standard output at once."""
    with suppress(OSError):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
