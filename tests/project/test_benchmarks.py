"""Benchmark scripts run and compute what they report. Nothing here measures time."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import floor
import goals
import kernel
import measure
import pair
import plans
import run
import startup
from mergekit_imm import merge_checkpoints
from peers.mergekit_dare import write_config

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks run on Linux only")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Base, start and sft of the smallest benchmark."""
    return pair.make_pair("tiny", tmp_path_factory.mktemp("tiny"), start=True)


def test_made_models_load(tiny: list[Path]) -> None:
    assert [path.name for path in tiny] == ["base", "start", "sft"]
    for path in tiny:
        model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(found.values()), found
        assert sum(p.numel() for p in model.parameters()) == pair.parameter_count("tiny")
    base, start, sft = (load_file(path / "model.safetensors") for path in tiny)
    for name, tensor in base.items():
        moved = (sft[name].float() - tensor.float()).norm() / tensor.float().norm()
        half = (start[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert 0.01 < moved < 0.03
        assert 0.4 < half / moved < 0.7


def test_made_models_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "SHARD", 100_000)
    base, sft = pair.make_pair("tiny", tmp_path)
    assert len(list(base.glob("model-*.safetensors"))) > 1
    report = merge_checkpoints(base, sft, tmp_path / "out")
    assert report.parameter_count == pair.parameter_count("tiny")


def test_sizes_are_those_of_the_real_models() -> None:
    counts = {"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688}
    assert {size: pair.parameter_count(size) for size in counts} == counts
    assert pair.parameter_count("qwen2.5-7b") == 7_615_616_512


def test_the_405_b_layout(tmp_path: Path) -> None:
    startup.make_llama(tmp_path / "llama")
    index = json.loads((tmp_path / "llama" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 191
    assert index["metadata"]["total_size"] == 2 * 405_853_388_800
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "llama").iterdir()) < 10_000_000


def test_models_of_many_tensors_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "IN_A_FILE", 700)
    plans.make_both(tmp_path, 2000)
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert (report.tensors["merged"], len(report.files)) == (2000, 3)
    names = load_file(tmp_path / "out" / report.files[0])
    assert list(names)[:1] == ["model.embed_tokens.weight"]
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in names


@linux
@pytest.mark.parametrize("reads", floor.READS)
@pytest.mark.parametrize("writes", floor.WRITES)
def test_floor_reads_and_writes_as_many_bytes(tiny: list[Path], tmp_path: Path, reads: str, writes: str) -> None:
    try:
        result = floor.copy(tiny[:2], tmp_path / "out", workers=2, reads=reads, writes=writes)
    except OSError as error:
        if (reads, writes) == ("hint", "cached"):
            raise
        pytest.skip(f"this filesystem has no O_DIRECT or RWF_DONTCACHE: {error}")
    size = (tiny[0] / "model.safetensors").stat().st_size
    assert (result["bytes_read"], result["bytes_written"]) == (2 * size, size)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tiny[0] / "model.safetensors").read_bytes()


def test_floor_refuses_inputs_of_other_sizes(tiny: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="same safetensors files"):
        floor.copy([tiny[0], tmp_path], tmp_path / "out", workers=1, reads="hint", writes="cached")


def test_script_by_hand_is_the_same_merge(tiny: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, sft = tiny
    script = str(ROOT / "benchmarks" / "peers" / "by_hand.py")
    monkeypatch.setattr(sys, "argv", [script, str(base), str(sft), str(tmp_path / "theirs"), "0.25", "0"])
    runpy.run_path(script)
    merge_checkpoints(base, sft, tmp_path / "ours", alpha=0.25, drop=0.0)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=2**-7, atol=0)


def test_mergekit_configuration(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yml", Path("b"), Path("s"), alpha=0.3, drop=0.9)
    content = json.loads((tmp_path / "c.yml").read_text())
    assert [model["parameters"] for model in content["models"]] == [
        {"weight": 0.3, "density": 1.0},
        {"weight": 0.7, "density": 0.1},
    ]


@linux
def test_measured(tmp_path: Path) -> None:
    took, printed = measure.measured([sys.executable, "-c", "x = bytearray(50_000_000); print(len(x))"])
    assert printed == "50000000\n"
    assert took["peak"] > 50_000_000
    with pytest.raises(measure.FailedError, match="exit status 3: sorry"):
        measure.measured([sys.executable, "-c", "import sys; print('sorry'); sys.exit(3)"])
    measure.warm([Path(__file__)])
    measure.evict([Path(__file__)])


@pytest.mark.parametrize("name", ["bf16", "bf16, three inputs"])
def test_kernel_is_measured(name: str) -> None:
    result = kernel.measure(name, 0)
    assert result["bytes_per_parameter"] == (6 if name == "bf16" else 8)
    assert result["repeats"] == 10


def results(floor_seconds: float) -> dict[str, Any]:
    """A benchmark result with given seconds for the floor."""
    ours = {"wall": 3.0, "stream": 2.0, "peak": 2e8, "read": 6e9, "written": 3e9}
    runs: run.Runs = {
        "imm-merge": {"warm": [ours] * 3, "cold": [ours] * 3},
        "floor direct/direct": {"warm": [{"stream": floor_seconds}] * 3},
        "floor hint/dontcache": {"warm": [{"stream": 5.0}] * 3},
        "mergekit": {"warm": [{"wall": 81.0, "peak": 9.6e9}]},
    }
    return {"sizes": {"qwen2.5-1.5b": {"summary": run.summary(runs)}}}


@pytest.mark.parametrize(("floor_seconds", "met"), [(2.0, True), (1.5, False)])
def test_goals(floor_seconds: float, met: bool) -> None:
    found = {goal["goal"]: goal for goal in goals.goals(results(floor_seconds))}
    assert found["streaming against the best floor"]["met"] is met
    assert found["whole process: that + 0.6 s"]["met"] is False
    assert found["times as fast as mergekit"]["value"] == 27
    assert found["peak memory of mergekit / ours"]["met"]
    assert found["peak memory of imm-merge"]["met"]


def test_page_shows_the_newest_results() -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "scripts" / "results.py", "--check"], check=True)


def test_result_files_name_no_places() -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        text = file.read_text()
        assert not re.search(r'["\s:=](/|~/)[A-Za-z]', text)  # an absolute path
