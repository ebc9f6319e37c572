"""Streamed merges give the bits of the pure functions and of the naive reference, however the work is split."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from checkpoints import State, files_of, random_state, read_model, same_bits, write_model
from mergekit_imm import dare_merge, iter_merged, merge_checkpoints
from mergekit_imm.engine.workers import MARGIN
from mergekit_imm.errors import NonFiniteError
from mergekit_imm.numerics.cpu import merge_span
from mergekit_imm.numerics.cuda import merge_span as merge_span_on_torch
from mergekit_imm.numerics.devices import Device
from mergekit_imm.numerics.mask import BLOCK, arithmetic, mask_key
from mergekit_imm.numerics.statistics import is_finite, new_tally, to_record
from strategies import DTYPES, WIDER, alphas, drops, kinds, seeds, tensor
from thorough import examples, others

OUT_DTYPE = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def overflows(merged: torch.Tensor, *inputs: torch.Tensor) -> bool:
    """Whether a merged value is not finite although its inputs are."""
    finite = torch.stack([each.double().isfinite() for each in inputs]).all(0)
    return bool((~merged.double().isfinite() & finite).any())


# The first third covers every pair of dtypes; each combination takes seconds to compile.
COMBINATIONS = sorted(product(DTYPES, repeat=3), key=lambda dtypes: sum(map(DTYPES.index, dtypes)) % 3)


@pytest.mark.parametrize(
    ("base_dtype", "sft_dtype", "out"), [*COMBINATIONS[:9], *others(*COMBINATIONS[9:])], ids=lambda d: str(d)[6:]
)
def test_every_combination_of_dtypes(
    tmp_path: Path, base_dtype: torch.dtype, sft_dtype: torch.dtype, out: torch.dtype
) -> None:
    base: State = {}
    sft: State = {}
    for i, (kind, count) in enumerate(product(("gauss", "bits", "edges"), (1, 1023, 5000))):
        base[f"h.{i}.w"] = tensor(count, base_dtype, seed=i, kind=kind, specials=True)
        sft[f"h.{i}.w"] = tensor(count, sft_dtype, seed=100 + i, kind=kind, specials=True)
    expected = {}
    for name in base:
        merged = reference.merge_tensors(base[name], sft[name], None, out, alpha=0.3, drop=0.5, name=name, seed=7)
        if overflows(merged, base[name], sft[name]):  # refused, as another test checks: use smaller inputs
            base[name] = tensor(base[name].numel(), base_dtype, seed=1, kind="gauss", specials=False)
            sft[name] = tensor(base[name].numel(), sft_dtype, seed=2, kind="gauss", specials=False)
            merged = reference.merge_tensors(base[name], sft[name], None, out, alpha=0.3, drop=0.5, name=name, seed=7)
        expected[name] = merged
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "sft", sft)
    merge_checkpoints(
        tmp_path / "base",
        tmp_path / "sft",
        tmp_path / "out",
        alpha=0.3,
        drop=0.5,
        seed=7,
        dtype=OUT_DTYPE[out],
        allow_nonfinite=True,
    )
    written = read_model(tmp_path / "out")
    pure = dare_merge(base, sft, alpha=0.3, drop=0.5, seed=7, dtype=out)
    assert list(written) == list(expected)
    for name, merged in expected.items():
        assert same_bits(written[name], merged), name
        assert same_bits(pure[name], merged), name


@pytest.mark.parametrize("out", [DTYPES[0], *others(*DTYPES[1:])], ids=lambda d: str(d)[6:])
def test_float64_is_rounded_once(tmp_path: Path, out: torch.dtype) -> None:
    """Not via float32, which would round a value close to a midpoint to the midpoint."""
    sft = tensor(2000, torch.float64, seed=1, kind="edges", specials=False)
    sft = torch.where(sft.abs() < 1e4, sft, 1.0)
    write_model(tmp_path / "base", {"w": torch.zeros(2000)})
    write_model(tmp_path / "sft", {"w": sft})
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0, drop=0, dtype=OUT_DTYPE[out])
    expected = reference.to_tensor(reference.narrow(sft.numpy(), out), out, (2000,))
    assert same_bits(read_model(tmp_path / "out")["w"], expected)


@settings(max_examples=examples(60))
@given(st.data())
def test_any_cut_of_the_work_gives_the_same_bytes(data: st.DataObject) -> None:
    """Sizes, shards, segments, buffers and workers are drawn; the reference uses none of them."""
    names = [f"model.layers.{i}.w" for i in range(data.draw(st.integers(1, 5)))]
    dtypes = st.sampled_from(WIDER)
    sizes = st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5000]) | st.integers(0, 6000)
    kind, alpha, drop, seed = data.draw(kinds), data.draw(alphas), data.draw(drops), data.draw(seeds)
    sides: dict[str, State] = {"base": {}, "sft": {}}
    if data.draw(st.booleans()):
        sides["start"] = {}
    for i, name in enumerate(names):
        size = data.draw(sizes)
        for j, side in enumerate(sides.values()):
            side[name] = tensor(size, data.draw(dtypes), seed=10 * i + j, kind=kind, specials=False)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for role, side in sides.items():
            order = data.draw(st.permutations(names))
            cuts = sorted(data.draw(st.sets(st.integers(1, len(names)), max_size=2)) | {len(names)})
            shards = [order[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
            write_model(root / role, side, shards=shards if data.draw(st.booleans()) else None)
        out_dtype = data.draw(st.sampled_from([None, "bfloat16", "float16", "float32"]))
        start = root / "start" if "start" in sides else None
        expected = {}
        refused = False
        for name in names:
            inputs = [side[name] for side in sides.values()]
            kind_out = getattr(torch, out_dtype) if out_dtype else inputs[0].dtype
            merged = reference.merge_tensors(
                inputs[0],
                inputs[1],
                inputs[2] if start else None,
                kind_out,
                alpha=alpha,
                drop=drop,
                seed=seed,
                iteration=3,
                name=name,
            )
            refused = refused or overflows(merged, *inputs)
            expected[name] = merged

        def run() -> None:
            record = data.draw(st.sampled_from([1 << 20, BLOCK, 4 * BLOCK]))
            buffer = data.draw(st.sampled_from([1 << 23, 40 * BLOCK, 100_000]))
            with (
                patch("mergekit_imm.plan.plan.SEGMENT_ELEMENTS", record),
                patch("mergekit_imm.engine.workers.BUFFER", MARGIN + buffer),
            ):
                merge_checkpoints(
                    root / "base",
                    root / "sft",
                    root / "out",
                    start=start,
                    alpha=alpha,
                    drop=drop,
                    seed=seed,
                    iteration=3,
                    dtype=out_dtype,
                    workers=data.draw(st.integers(1, 5)),
                    max_shard_size=data.draw(st.sampled_from([None, "1KB", "20KB"])),
                )

        if refused:
            with pytest.raises(NonFiniteError, match="too large for the output dtype"):
                run()
            assert not any(p.name.startswith("out") for p in root.iterdir())
            return
        run()
        written = read_model(root / "out")
        assert set(written) == set(expected)
        for name, merged in expected.items():
            assert same_bits(written[name], merged), name


SHAPES = {
    "model.embed_tokens.weight": (300, 64),
    **{f"model.layers.{i}.{m}.weight": (64, 96) for i in range(3) for m in ("up", "down")},
    **{f"model.layers.{i}.norm.weight": (64,) for i in range(3)},
    "model.norm.weight": (64,),
    "lm_head.weight": (300, 64),
}


def pair(root: Path) -> tuple[Path, Path, State, State]:
    base = random_state(SHAPES, seed=1)
    sft = {n: (t.float() + 0.001 * torch.randn(t.shape)).to(t.dtype) for n, t in base.items()}
    config = {"model_type": "x", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    names = list(SHAPES)
    one = write_model(root / "base", base, shards=[names[::2], names[1::2]], config=config)
    two = write_model(root / "sft", sft, config=config, side={"tokenizer.json": "{}", "sub/a.txt": "a"})
    return one, two, base, sft


def test_whole_folders_are_equal_across_runs_workers_buffers_and_working_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sft, _, _ = pair(tmp_path)
    folders = []
    for number, (workers, buffer) in enumerate(((1, 1 << 23), (3, 1 << 23), (2, 70_000))):
        elsewhere = tmp_path / f"cwd{number}"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        with patch("mergekit_imm.engine.workers.BUFFER", MARGIN + buffer):
            merge_checkpoints(base, sft, tmp_path / f"out{number}", drop=0.9, workers=workers)
        folders.append(files_of(tmp_path / f"out{number}"))
    assert folders[0] == folders[1] == folders[2]
    assert "sub/a.txt" in folders[0]


def test_a_stream_of_tensors_is_the_folder(tmp_path: Path) -> None:
    base, sft, _, _ = pair(tmp_path)
    merge_checkpoints(base, sft, tmp_path / "out", drop=0.9)
    written = read_model(tmp_path / "out")
    streamed = dict(iter_merged(base, sft, drop=0.9))
    assert set(streamed) == set(written)
    assert all(same_bits(streamed[name], written[name]) for name in written)


SUMMED = 2**-21  # at most eight float32 roundings of a sum of squares, then a square root


def test_statistics_are_those_of_a_naive_count(tmp_path: Path) -> None:
    base, sft, b, s = pair(tmp_path)
    merge_checkpoints(base, sft, tmp_path / "out", alpha=0.3, drop=0.9)
    written = read_model(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "imm_report.json").read_text())

    def norm(*tensors: torch.Tensor) -> float:
        return math.sqrt(math.fsum(float(x) ** 2 for t in tensors for x in t.double().reshape(-1).tolist()))

    for name, entry in report["tensors"].items():
        change = written[name].float() - b[name].float()
        count = b[name].numel()
        assert entry["elements"] == count
        assert entry["kept_share"] == reference.mask(name, 0, count, 0.9).mean()
        assert entry["delta_norm"] == pytest.approx(norm(s[name].float() - b[name].float()), rel=SUMMED)
        assert entry["base_norm"] == pytest.approx(norm(b[name]), rel=SUMMED)
        assert entry["change_norm"] == pytest.approx(norm(change), rel=SUMMED)
        assert entry["largest_change"] == float(change.abs().max())
    inside = [n for n in b if n.startswith("model.layers.1.")]
    layer = report["layers"]["model.layers.1"]
    assert layer["base_norm"] == pytest.approx(norm(*(b[n] for n in inside)), rel=SUMMED)
    assert layer["elements"] == sum(b[n].numel() for n in inside)


def test_the_torch_path_of_gpus_gives_the_same_folder(tmp_path: Path) -> None:
    from mergekit_imm.numerics.cuda import buffer, merge_span_on

    base, sft, _, _ = pair(tmp_path)
    merge_checkpoints(base, sft, tmp_path / "kernel", drop=0.9)
    with patch("mergekit_imm.engine.write_folder.pick_device", lambda _: Device(merge_span_on("cpu"), buffer)):
        merge_checkpoints(base, sft, tmp_path / "torch", drop=0.9)
    assert files_of(tmp_path / "kernel") == files_of(tmp_path / "torch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_folder(tmp_path: Path) -> None:
    base, sft, _, _ = pair(tmp_path)
    merge_checkpoints(base, sft, tmp_path / "cpu", drop=0.9)
    merge_checkpoints(base, sft, tmp_path / "cuda", drop=0.9, device="cuda")
    assert files_of(tmp_path / "cpu") == files_of(tmp_path / "cuda")


KERNELS = {"numba": merge_span, "torch": functools.partial(merge_span_on_torch, torch.device("cpu"))}


@pytest.mark.parametrize("merge", KERNELS.values(), ids=KERNELS)
def test_pieces_add_up_to_one_record(merge: Callable[..., None]) -> None:
    count = 5 * BLOCK + 77
    sides = [
        (tensor(count, torch.bfloat16, seed=n, kind="gauss", specials=False).view(torch.uint8).numpy(), "BF16")
        for n in range(2)
    ]
    records = []
    for step in (count, BLOCK, 2 * BLOCK):
        tally = new_tally()
        for first in range(0, count, step):
            pieces = [(raw[2 * first :][: 2 * step], dtype) for raw, dtype in sides]
            length = len(pieces[0][0]) // 2
            out = (np.zeros(2 * length, np.uint8), "BF16")
            merge(
                pieces[0],
                pieces[0],
                pieces[1],
                out,
                length,
                first,
                mask_key("n"),
                arithmetic(alpha=0.5, drop=0.9),
                tally,
            )
        records.append(to_record(tally).tolist())
    assert records[0] == records[1] == records[2]


@pytest.mark.parametrize("merge", KERNELS.values(), ids=KERNELS)
def test_a_record_shows_what_is_not_finite(merge: Callable[..., None]) -> None:
    base, sft = torch.zeros(1500, dtype=torch.bfloat16), torch.ones(1500, dtype=torch.bfloat16)
    sft[7], base[1400] = torch.nan, torch.inf
    sides = [(each.view(torch.uint8).numpy(), "BF16") for each in (base, base, sft)]
    sides[1] = sides[0]
    tally, out = new_tally(), (np.zeros(3000, np.uint8), "BF16")
    merge(*sides, out, 1500, 0, mask_key("n"), arithmetic(alpha=0.5, drop=0.0), tally)
    assert not is_finite(tally)
    assert np.isnan(to_record(tally)[3])
    assert to_record(tally)[4] == 1500


def test_any_number_of_workers_has_room_for_a_block(tmp_path: Path) -> None:
    states = (random_state({"w": (5000,)}, seed=seed, dtype=torch.float64) for seed in range(3))
    base, sft, start = (write_model(tmp_path / f"in{seed}", state) for seed, state in enumerate(states))
    outs = []
    for workers in (1, 3):
        with patch("mergekit_imm.engine.workers.BUFFERS", 1000):
            out = tmp_path / f"o{workers}"
            merge_checkpoints(base, sft, out, start=start, iteration=1, drop=0.9, workers=workers)
        outs.append(files_of(tmp_path / f"o{workers}"))
    assert outs[0] == outs[1]


def test_workers_end_where_one_cannot_be_started(tmp_path: Path) -> None:
    base, sft, _, _ = pair(tmp_path)
    start, started = threading.Thread.start, list[threading.Thread]()

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with patch("threading.Thread.start", limited), pytest.raises(RuntimeError, match="can't start new thread"):
        merge_checkpoints(base, sft, tmp_path / "out", workers=4)
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts by the kernel need Linux")
@pytest.mark.parametrize("with_start", [False, True])
def test_inputs_are_read_once_and_the_output_is_written_once(tmp_path: Path, with_start: bool) -> None:
    shapes = {f"model.layers.{i}.w": (1500, 1000) for i in range(4)}
    states = [random_state(shapes, seed=i) for i in range(3)]
    base, sft, start = (write_model(tmp_path / f"in{i}", state) for i, state in enumerate(states))
    merge_checkpoints(base, base, tmp_path / "warm")  # loads and compiles everything once

    def io() -> dict[str, int]:
        return {k: int(v) for k, v in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())}

    before = io()
    report = merge_checkpoints(
        base, sft, tmp_path / "out", start=start if with_start else None, iteration=1, drop=0.9, workers=2
    )
    after = io()
    size = sum(t.nbytes for t in states[0].values())
    inputs = (3 if with_start else 2) * size
    assert report.bytes_read == inputs
    assert after["rchar"] - before["rchar"] <= 1.01 * inputs
    assert size <= report.bytes_written <= 1.01 * size
    assert after["wchar"] - before["wchar"] <= 1.01 * size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """One sparse tensor of 400 MB, more than the limit."""
    for name in ("base", "sft"):
        folder = tmp_path / name
        folder.mkdir()
        count = 200_000_000
        entry = {"w": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}
        header = json.dumps(entry).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 2 * count)
    script = """
        import sys
        from mergekit_imm import merge_checkpoints
        merge_checkpoints(sys.argv[1], sys.argv[2], sys.argv[3], drop=.9, workers=4)
        peak = next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")) * 1024
        assert peak < 320 << 20, peak
    """
    arguments = [str(tmp_path / name) for name in ("base", "sft", "out")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *arguments], check=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 400_000_000
