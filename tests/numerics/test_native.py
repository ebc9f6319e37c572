"""Compiled loops: the arguments that reach them, and the files that keep their machine code."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argument_kinds import arrived
from mergekit_imm.errors import ArgumentError
from mergekit_imm.numerics import native, object_code
from mergekit_imm.numerics.native import Loop
from mergekit_imm.numerics.numba_jit import jit
from mergekit_imm.numerics.object_code import machine_code

LOOP = Loop("argument_kinds", "arrived")


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.booleans(),
    st.sampled_from(["i1", "u2", "f4", "f8", "u8"]),
    st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
)
def test_arguments_arrive_as_python_passes_them(
    whole: int,
    word: int,
    single: float,
    flag: bool,
    dtype: str,
    shape: tuple[int, int, int, int],
    columns_first: bool,
) -> None:
    rows, columns, row_step, column_step = shape
    matrix = np.arange(rows * row_step * columns * column_step).astype(dtype)
    matrix = matrix.reshape(rows * row_step, columns * column_step)[::row_step, ::column_step]
    numbers = (whole, (np.uint32(word), np.float32(single)))
    found, expected = np.zeros((2, 7 + matrix.size))
    matrix = np.asfortranarray(matrix) if columns_first else matrix
    arguments = (numbers, flag, None, matrix, (np.float32(0.5), 2.5))
    LOOP(*arguments, found)
    arrived.py_func(*arguments, expected)  # type: ignore[attr-defined]
    assert found.tobytes() == expected.tobytes() or (np.isnan(single) and np.isnan(found[2]))


def test_later_processes_load_the_code_without_numba(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np\n"
        "from mergekit_imm.numerics.cpu import merge_span\n"
        "from mergekit_imm.numerics.mask import arithmetic\n"
        "from mergekit_imm.numerics.statistics import new_tally\n"
        "g = np.random.default_rng(0)\n"
        "base, sft = (g.normal(size=3000).astype('f4') for _ in range(2))\n"
        "out, tally = np.zeros(3000, 'f4'), new_tally()\n"
        "raw = [(x.view('u1'), 'F32') for x in (base, base, sft, out)]\n"
        "merge_span(raw[0], raw[0], *raw[2:], 3000, 0, (1, 2), arithmetic(alpha=0.5, drop=0.5), tally)\n"
        "print('numba' in sys.modules, out.tobytes().hex(), tally.tobytes().hex())\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout.split()[0] == "True"
    assert second.stdout.split() == ["False", *first.stdout.split()[1:]]
    assert first.stderr == f"{native.COMPILING}\n"
    assert "once for each kind of merge" in first.stderr
    assert "later merges of this kind start at once" in first.stderr
    assert second.stderr == ""


def _lacking(content: bytes) -> bytes:
    return content[:-1]


def _flipped(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def _of_another(_: bytes) -> bytes:
    """Return a valid file whose code has another function."""
    import llvmlite.binding as llvm

    code = object_code.target_machine().emit_object(llvm.parse_assembly("define void @other() { ret void }"))
    return native.with_digest(code)


@pytest.mark.parametrize("damaged", [lambda _: b"", _lacking, _flipped, _of_another])
def test_a_damaged_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "folders", lambda: iter([tmp_path]))

    def call() -> list[float]:
        out = np.zeros(8)
        Loop("argument_kinds", "arrived")((1, (2, 3)), True, None, np.ones((1, 1)), (1, 2), out)
        return out.tolist()

    expected = call()
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(damaged(good))
    assert call() == expected
    assert path.read_bytes() == good


def test_code_of_other_cpus_and_settings_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "folders", lambda: iter([tmp_path]))
    for target, setting in ((("a", "+x"), "0"), (("a", "+y"), "0"), (("b", "+x"), "0"), (("a", "+x"), "1")):
        monkeypatch.setattr(native, "target", lambda target=target: target)
        monkeypatch.setenv("NUMBA_BOUNDSCHECK", setting)
        Loop("argument_kinds", "arrived")((1, (2, 3)), True, None, np.ones((1, 1)), (1, 2), np.zeros(8))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_note_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    native.say("note: this disk is full")


def test_numba_without_its_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "folders", lambda: iter([tmp_path]))
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    with pytest.raises(ArgumentError, match=r"^NUMBA_DISABLE_JIT is set, .*; unset it$"):
        Loop("argument_kinds", "arrived")((1, (2, 3)), True, None, np.ones((1, 1)), (1, 2), np.zeros(8))


def test_a_loop_that_calls_what_only_numba_has_is_refused() -> None:
    """A later run would load it without numba, and crash."""

    @jit
    def reshapes(values: Any) -> None:
        values.reshape((2, -1))[0, 0] = 1

    with pytest.raises(RuntimeError, match="compiled loops must do without"):
        machine_code(reshapes, (np.zeros(8, np.float32),))
