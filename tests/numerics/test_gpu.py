"""The merge on a GPU: some tests run on any machine, the rest only with a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from checkpoints import files_of, random_state, same_bits, write_model
from mergekit_imm import dare_merge, keep_mask, merge_checkpoints
from mergekit_imm.numerics import cuda, triton_kernel
from mergekit_imm.numerics.mask import BLOCK, arithmetic, mask_key
from mergekit_imm.numerics.reference import CHUNK, merge_flat
from mergekit_imm.numerics.statistics import KEPT, LANES, LARGEST, TALLY, new_tally, to_record
from reference import CODES
from strategies import DTYPES, WIDER, drops, kinds, tensor
from thorough import others

NAME = "model.layers.0.mlp.up_proj.weight"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# --- sums, on any device


def merge_and_add(
    sides: list[torch.Tensor], out: torch.dtype, first: int, numbers: dict[str, float], tally: Any, expected: Any
) -> None:
    """Merge base, start and sft (start may be the base) and add to a tally, and do the same naively."""
    count = len(sides[0])
    raws = {id(x): (x.view(torch.uint8).numpy(), CODES[x.dtype]) for x in sides}
    base, start, sft = (raws[id(x)] for x in sides)
    raw = np.empty(count * out.itemsize, np.uint8)
    cuda.merge_span(
        torch.device("cpu"),
        base,
        start,
        sft,
        (raw, CODES[out]),
        count,
        first,
        mask_key(NAME),
        arithmetic(**numbers),
        tally,
    )
    b, s, f = map(reference.to_array, sides)
    with np.errstate(all="ignore"):
        merged = reference.merge(b, f, s, out, name=NAME, first=first, **numbers)
        reference.add_to_tally(expected, b, s, f, merged, reference.mask(NAME, first, count, numbers["drop"]))
    assert raw.tobytes() == merged.tobytes()
    np.testing.assert_array_equal(tally, expected)  # treats all NaN as equal


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.sampled_from(WIDER)] * 3),
    st.sampled_from(DTYPES),
    kinds,
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([1, 2, 127, 1023, 1024, 1025]) | st.integers(0, 2200),
    st.sampled_from([0.0, 1.0, 0.3, 0.5, 0.7]),
    st.just(0.0) | drops,
    st.sampled_from([1.0, 0.5]),
    st.booleans(),
)
def test_tally_of_two_segments(
    dtypes: tuple[torch.dtype, ...],
    out: torch.dtype,
    kind: str,
    specials: bool,
    seed: int,
    second: int,
    alpha: float,
    drop: float,
    factor: float,
    with_start: bool,
) -> None:
    """Two pieces, added to one tally: a whole block, and the rest."""
    tally, expected = new_tally(), new_tally()
    numbers = {"alpha": alpha, "drop": drop, "factor": factor}
    for first, count in ((0, BLOCK), (BLOCK, second)):
        base, start, sft = (
            tensor(count, dtype, seed=seed + first + i, kind=kind, specials=specials) for i, dtype in enumerate(dtypes)
        )
        merge_and_add([base, start if with_start else base, sft], out, first, numbers, tally, expected)


@pytest.mark.parametrize("dtype", WIDER, ids=str)
def test_blocks_are_added_one_after_another(dtype: torch.dtype) -> None:
    """Many blocks, so that sums round, added to a non-empty tally."""
    sides = [tensor(20 * BLOCK + 9, dtype, seed=i, kind="gauss", specials=False) for i in range(3)]
    tally = np.random.default_rng(0).random(TALLY)
    merge_and_add(sides, dtype, 0, {"alpha": 0.3, "drop": 0.5}, tally, tally.copy())


def test_nan_is_not_the_largest_change() -> None:
    sides = [torch.tensor([1.0, torch.nan, 2.0, -4.0]), torch.tensor([2.0, 3.0, torch.nan, 4.0])]
    tally, expected = new_tally(), new_tally()
    merge_and_add([sides[0], *sides], torch.float32, 0, {"alpha": 0.5, "drop": 0.0}, tally, expected)
    assert tally[LARGEST] == 4.0
    assert np.isnan(tally[:LARGEST]).any()


def test_layout_of_a_tally() -> None:
    assert (LANES, LARGEST, KEPT, TALLY) == (16, 48, 49, 50)


def test_a_buffer_is_writable_and_outlives_its_name() -> None:
    view = cuda.buffer(1 << 20)[4096:]
    view[:] = 7
    assert view.dtype == np.uint8
    assert view.flags.c_contiguous
    assert int(view.sum(dtype=np.int64)) == 7 * ((1 << 20) - 4096)


# --- the fused kernel, without a GPU


@needs_triton
@pytest.mark.parametrize("every", ["3", *others("1")])
def test_interpreted_kernel_has_the_bits_of_the_reference(every: str) -> None:
    script = Path(__file__).parents[1] / "support" / "interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), every]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


class CompilesOnly:
    """A kernel that is compiled instead of launched, for a GPU that need not exist."""

    def __init__(self, kernel: Any, launched: list[Any]) -> None:
        self.kernel = kernel
        self.launched = launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.launched.append(self.kernel.warmup(*args, grid=grid, **options))


Compiled = Callable[[int, Callable[[], None]], list[Any]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiled:
    """A function that returns the kernel that a call would launch, compiled for a GPU of a given capability."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    kernels = {name: getattr(triton_kernel, name) for name in ("_merge", "_keep")}

    def compile_for(capability: int, call: Callable[[], None]) -> list[Any]:
        class Driver:
            def get_current_target(self) -> Any:
                return GPUTarget("cuda", capability, 32)

            def get_current_device(self) -> int:
                return capability  # kernels are cached by device

            def get_current_stream(self, _: int) -> int:
                return 0

        monkeypatch.setattr(driver, "_active", Driver())  # reset_active() looks for a GPU
        launched: list[Any] = []
        for name, kernel in kernels.items():
            monkeypatch.setattr(triton_kernel, name, CompilesOnly(kernel, launched))
        call()
        return launched

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compile_for


def merge_of(
    dtypes: tuple[torch.dtype, ...], alpha: float, drop: float, start_is_base: bool = False
) -> Callable[[], None]:
    base, start, sft, out = (torch.zeros((1 << 14) + 5, dtype=dtype) for dtype in dtypes)
    constants = arithmetic(alpha=alpha, drop=drop)
    return lambda: triton_kernel.merge_flat_fused(
        base, base if start_is_base else start, sft, out, constants, 1, 2, 1 << 40
    )


MIXES = [
    ((torch.bfloat16,) * 4, True),
    ((torch.bfloat16,) * 4, False),
    ((torch.float16,) * 4, False),
    ((torch.float32,) * 4, False),
    ((torch.bfloat16, torch.float32, torch.float16, torch.bfloat16), False),
]


@needs_triton
@pytest.mark.parametrize("capability", [*others(80), 90])
@pytest.mark.parametrize(("dtypes", "start_is_base"), [*others(*MIXES[:-1]), MIXES[-1]], ids=str)
def test_compiled_kernel_rounds_every_operation_and_uses_vectors(
    compiled: Compiled, dtypes: tuple[torch.dtype, ...], start_is_base: bool, capability: int
) -> None:
    kernel, _ = compiled(capability, merge_of(dtypes, 0.3, 0.5, start_is_base))  # and one for the last five elements
    code = kernel.asm["ptx"]
    found = set(re.findall(r"^\s*(?:@%?!?\w+\s+)?([a-z]\w*\.[\w.:]+)", code, re.MULTILINE))
    floats = {name for name in found if re.match(r"(add|sub|mul|fma|mad|div|rcp|cvt)\.", name) and "f32" in name}
    exact = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "cvt.f32.f16", "cvt.rn.f16.f32"}
    assert floats <= exact  # no fma, no .ftz, no .approx, no rounding left open
    assert not [name for name in found if "shared" in name or name.startswith("bar.")]  # threads are independent
    loads = re.findall(r"ld\.global\S*", code)
    assert len(loads) == 8 * (2 if start_is_base else 3)
    assert all(".v2." in load or ".v4." in load for load in (*loads, *re.findall(r"st\.global\S*", code)))
    assert not re.search(r"FFMA|HFMA2(?!\.MMA)|\.FTZ", kernel.asm["sass"])


@needs_triton
@pytest.mark.parametrize(
    ("alpha", "drop", "inputs"), [(1.0, 0.5, 1), (0.5, 0.0, 2), (0.0, 0.0, 1), (0.0, 0.5, 2), (0.7, 0.5, 3)]
)
def test_kernel_reads_only_the_inputs_it_needs(compiled: Compiled, alpha: float, drop: float, inputs: int) -> None:
    kernel, _ = compiled(80, merge_of((torch.bfloat16,) * 4, alpha, drop))
    assert len(re.findall(r"ld\.global", kernel.asm["ptx"])) == 8 * inputs


@needs_triton
def test_one_kernel_serves_all_keys_names_and_drops(compiled: Compiled) -> None:
    """Compiling takes a second; a model has hundreds of names."""
    base, sft, out = (torch.zeros(1 << 14) for _ in range(3))
    kernels = []
    for key, drop, alpha, first in (
        (1, 0.5, 0.3, 0),
        (16, 0.75, 0.7, 0),
        (1 << 31, 0.9, 0.8, 1 << 14),
        (77, 0.2, 0.6, 0),
    ):
        constants = arithmetic(alpha=alpha, drop=drop)
        call = functools.partial(
            triton_kernel.merge_flat_fused, base, base, sft, out, constants, key, 2**32 - key, first
        )
        kernels += compiled(90, call)
    hashes = [kernel.hash for kernel in kernels]
    assert len(set(hashes[1:])) == 1  # 0.3 is mixed the other way round


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_mask_kernel_compiles(compiled: Compiled, capability: int) -> None:
    out = torch.empty(1 << 14, dtype=torch.bool)
    (kernel,) = compiled(capability, lambda: triton_kernel.keep_flat_fused(out, 100, 1, 2, 0))
    assert "st.global" in kernel.asm["ptx"]


def test_a_kernel_that_cannot_run_is_not_used() -> None:
    assert not triton_kernel._agrees.__wrapped__(torch.device("cpu"))


def test_unsuitable_tensors_use_the_torch_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "_agrees", lambda _: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not triton_kernel.fits(torch.zeros(3))
    monkeypatch.setattr(triton_kernel, "triton", None)
    assert not triton_kernel.fits(torch.zeros(3))


# --- with a GPU


def random_tensors(count: int, dtypes: tuple[torch.dtype, ...]) -> list[torch.Tensor]:
    return [
        tensor(count, dtype, seed=i, kind=("bits", "edges", "gauss")[i], specials=True).cuda()
        for i, dtype in enumerate(dtypes)
    ]


@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtypes", list(product(DTYPES, repeat=4)), ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_triton_and_torch_agree_on_cuda(dtypes: tuple[torch.dtype, ...]) -> None:
    for count, first in ((1, 0), (4095, 1 << 40), (70_000, 777), (1 << 20, 0)):
        base, start, sft = random_tensors(count, dtypes[:3])
        for alpha, drop, factor in (
            (0.5, 0.9, 1.0),
            (0.7, 0.2, 1.5),
            (0.3, 0.0, 1.0),
            (1.0, 0.2, 1.0),
            (0.0, 0.2, 1.0),
        ):
            constants, key = arithmetic(alpha=alpha, drop=drop, factor=factor), mask_key(NAME)
            out = torch.empty(count, dtype=dtypes[3], device="cuda")
            assert triton_kernel.fits(base, start, sft, out)
            triton_kernel.merge_flat_fused(base, start, sft, out, constants, *key, first)
            assert same_bits(out, merge_flat(base, start, sft, out.dtype, constants, *key, first))


@needs_cuda
@pytest.mark.parametrize("dtype", WIDER, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (CHUNK + 3,), (2048, 4096)], ids=str)
def test_pure_functions_agree_on_cuda_and_cpu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    base, sft, start = (tensor(count, dtype, seed=i, kind="bits", specials=True).view(shape) for i in range(3))
    for with_start in (False, True):
        begin = start if with_start else None
        merged = dare_merge(base, sft, start=begin, name=NAME)
        on_gpu = dare_merge(base.cuda(), sft.cuda(), start=begin.cuda() if with_start else None, name=NAME)  # type: ignore[union-attr]
        assert same_bits(on_gpu.cpu(), merged)
    assert torch.equal(keep_mask(NAME, shape, drop=0.5, device="cuda").cpu(), keep_mask(NAME, shape, drop=0.5))
    transposed = dare_merge(base.cuda().transpose(0, -1), sft.cuda().transpose(0, -1), name=NAME) if shape else None
    if transposed is not None:
        assert same_bits(transposed.cpu(), dare_merge(base.transpose(0, -1), sft.transpose(0, -1), name=NAME))


@needs_cuda
def test_streamed_merge_has_equal_tallies_on_cuda_and_cpu() -> None:
    """Four threads at once, like workers, with and without pinned buffers."""
    count = 100_000
    failures: list[str] = []

    def work(seed: int) -> None:
        base, start, sft = (
            tensor(count, torch.bfloat16, seed=seed + i, kind="gauss", specials=False) for i in range(3)
        )
        results = []
        for device, pinned in (("cpu", False), ("cuda", False), ("cuda", True)):
            memory = cuda.buffer(8 * count) if pinned else np.empty(8 * count, np.uint8)
            parts = [memory[2 * count * i : 2 * count * (i + 1)] for i in range(4)]
            for part, side in zip(parts, (base, start, sft), strict=False):
                part[:] = side.view(torch.uint8).numpy()
            tally = new_tally()
            b, s, f, o = ((part, "BF16") for part in parts)
            constants = arithmetic(alpha=0.5, drop=0.9)
            cuda.merge_span(torch.device(device), b, s, f, o, count, 0, mask_key(NAME), constants, tally)
            results.append((tally.tobytes(), to_record(tally).tobytes(), o[0].tobytes()))
        if len(set(results)) > 1:
            failures.append(f"seed {seed}")

    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_cuda
@pytest.mark.parametrize("workers", [1, 3])
def test_folders_are_equal_on_cuda_and_cpu(tmp_path: Path, workers: int) -> None:
    shapes = {f"model.layers.{i}.w": (700, 301 + i) for i in range(6)}
    for i, role in enumerate(("base", "start", "sft")):
        write_model(tmp_path / role, random_state(shapes, seed=i, dtype=(*DTYPES, torch.float16)[i]))
    for device in ("cpu", "cuda"):
        merge_checkpoints(
            tmp_path / "base",
            tmp_path / "sft",
            tmp_path / device,
            start=tmp_path / "start",
            iteration=1,
            drop=0.9,
            device=device,
            workers=workers,
        )
    assert files_of(tmp_path / "cpu") == files_of(tmp_path / "cuda")
