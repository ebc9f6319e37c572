"""The commands as a user runs them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from checkpoints import random_state, write_model

SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.mlp.weight": (8, 8),
    "model.layers.1.mlp.weight": (8, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (32, 8),
}
NAMES = list(SHAPES)
CONFIG = {"architectures": ["Tiny"], "dtype": "bfloat16", "model_type": "tiny", "tie_word_embeddings": False}
SIDE = {"tokenizer.json": '{"a": 1}\n', "templates/chat.jinja": "{{ x }}", "optimizer.pt": "x"}
HUNG = 600  # seconds after which a process hangs, on any machine
SHARD = "model-00001-of-00002.safetensors"


def write_pair(folder: Path) -> Path:
    """Write base and sft into a folder."""
    for seed, role in enumerate(("base", "sft")):
        write_model(folder / role, random_state(SHAPES, seed=seed), config=CONFIG, side=SIDE)
    return folder


SLOW = """
import signal, time
from mergekit_imm.cli.main import main
from mergekit_imm.numerics import cpu
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background hands down 'ignored'
merge_span = cpu.merge_span
def slowly(*arguments):
    time.sleep(0.1)
    merge_span(*arguments)
cpu.merge_span = slowly
main()
"""


STOPPING = """
import os, signal, sys, threading, time
from mergekit_imm.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
def stopping():  # the main thread waits for its workers
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code is not threading.Thread.join.__code__:
        frame = frame.f_back
    return frame is not None
"""

HELD = """
from mergekit_imm.numerics import cpu
merge_span, closed = cpu.merge_span, threading.Event()
def listen():
    os.read(0, 1)  # standard input is closed
    closed.set()
def held(*arguments):
    merge_span(*arguments)
    while threading.current_thread() is not threading.main_thread() and not (UNTIL):
        time.sleep(0.01)
threading.Thread(target=listen, daemon=True).start()
cpu.merge_span = held
main()
"""


def held_until(what: str) -> str:
    """A command whose workers wait: until `closed.is_set()`, its standard input; or `stopping()`, it ends."""
    return STOPPING + HELD.replace("UNTIL", what)


# A command whose workers hang in a read, after some. It says when they do, and when it waits for them.
HUNG_READ = (
    STOPPING
    + """
preadv, reads = os.preadv, []
def hanging(*arguments):
    if threading.current_thread() is not threading.main_thread():
        reads.append(1)
        if len(reads) > 12:
            threading.Event().wait()
    return preadv(*arguments)
def watch():
    for what in (lambda: len(reads) > 13, stopping):
        while not what():
            time.sleep(0.01)
        print("now", flush=True)
threading.Thread(target=watch, daemon=True).start()
os.preadv = hanging
main()
"""
)


LATE = """
import os, signal
from mergekit_imm import __main__
from mergekit_imm.engine import stream
stream.SYNC_BYTES = 2 << 20
note = stream._Output.note
def noted(self, *arguments):
    note(self, *arguments)
    if self.job.written > SHARE * self.job.plan.bytes_to_write:
        os.kill(os.getpid(), signal.SIGKILL)
stream._Output.note = noted
__main__._begin("main")
"""


@dataclass
class Ended:
    """A command that ran."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its last line on standard error, which must be an error message."""
        assert "Traceback" not in self.err
        last = self.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert not last.startswith("error: unexpected")
        return last.removeprefix("error: ")


Command = Callable[..., Ended]


@functools.cache
def _forker() -> subprocess.Popen[str]:
    forker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(forker.communicate)  # it ends with its input
    return forker


def forked(*arguments: str, cwd: Path | None) -> Ended:
    """Run `python -m mergekit_imm` in a fork of a process that has it loaded: a tenth of the time."""
    forker = _forker()
    assert forker.stdin is not None
    assert forker.stdout is not None
    with NamedTemporaryFile() as out, NamedTemporaryFile() as err:
        request = {
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ),
            "out": out.name,
            "err": err.name,
        }
        print(json.dumps(request), file=forker.stdin, flush=True)
        hangs = threading.Timer(HUNG, os.killpg, (forker.pid, signal.SIGKILL))
        hangs.start()
        status = forker.stdout.readline()
        hangs.cancel()
        return Ended(int(status), *(Path(each.name).read_text() for each in (out, err)))


def subprocess_of(*arguments: object, code: str | None = None, **options: Any) -> Ended:
    """Run `python -m mergekit_imm`, or code that stands for it, in a process of its own."""
    if code is None and options.keys() <= {"cwd"}:
        return forked(*map(str, arguments), cwd=options.get("cwd"))
    program = ["-m", "mergekit_imm"] if code is None else ["-c", code]
    ended = subprocess.run(
        [sys.executable, *program, *map(str, arguments)], capture_output=True, text=True, timeout=HUNG, **options
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def on_a_terminal(*arguments: object, cwd: Path) -> str:
    """What a command prints on a terminal, on standard error."""
    printed, status = seen_on_a_terminal([SLOW, *map(str, arguments)], cwd, stdout=subprocess.DEVNULL)
    assert status == 0
    return printed


def seen_on_a_terminal(
    code: Sequence[str], cwd: Path, *, env: Mapping[str, str] | None = None, stdout: int | None = None
) -> tuple[str, int]:
    """What Python code, with arguments, prints on a terminal, and its status; `stdout` may go elsewhere."""
    master, slave = pty.openpty()
    where = slave if stdout is None else stdout
    with subprocess.Popen([sys.executable, "-c", *code], cwd=cwd, env=env, stdout=where, stderr=slave) as process:
        os.close(slave)
        printed = b""
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            printed += piece
        status = process.wait(HUNG)
    os.close(master)
    return printed.decode(), status


@contextmanager
def flipped(path: Path, position: int, bit: int = 0) -> Iterator[None]:
    """Flip one bit of a file for a while."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)
