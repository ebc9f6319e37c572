"""Options of later merges, checked against the headers of the base."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_imm
from checkpoints import files_of, random_state, same_bits, write_model
from fake_hub import fake_hub
from mergekit_imm import ArgumentError, CheckpointError, MismatchError, merge_into
from mergekit_imm.loop.early_checks import check_options

SHAPES = {"model.embed_tokens.weight": (8, 4), "model.layers.0.w": (8, 8), "model.layers.1.w": (8, 8)}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_model(tmp_path / "base", random_state(SHAPES), config={"model_type": "tiny"})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": ["embed"], "no_drop": ["layers"], "workers": 2, "dtype": None, "max_shard_size": "5GB"},
        {"take": ["only.the.trained.model.has.it"]},
        {"rename": ["^language=typo", r"^(typo)[.](\w+)=model.\2"]},  # a rule may feed the next one
        {"rename": [r"^a[.]layers[.](\d)=model.layers.\1"]},
        {"rename": ["^module[.]="]},
        {"importance": {"0": 1.0, "1": 2.0}, "shrink": 0.5, "clip": (0.5, 1.5)},
        {"layer_factors": "lines:1,0.5"},
        {"dequantize": True},  # the trained model may be FP8
    ],
)
def test_what_a_merge_may_accept_is_accepted(base: Path, options: dict[str, Any]) -> None:
    check_options(base, options, points=[{"alpha": 0.5, "drop": 0.9}, {"alpha": 0.0, "drop": 0.0}])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": "embed"}, "keep is a string"),
        ({"rename": [r"^a[.]layers[.](\d)=model.layer.\1"]}, "no tensor of base .*base has such a name"),
        ({"importance": {"0": 1.0, "2": 2.0}}, "no tensor of the model lies in layer 'model.layers.2'"),
        ({"layer_factors": {"0": 1e37, "1": 1.0}}, "does not fit in float32"),  # only with the second drop
    ],
)
def test_what_every_merge_would_refuse_is_refused(base: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        check_options(base, options, points=[{"alpha": 0.5, "drop": 0.0}, {"alpha": 0.5, "drop": 0.99}])


def test_a_base_that_is_quantised_is_refused(base: Path) -> None:
    quantisation = {"quant_method": "gptq", "bits": 4}
    write_model(base, random_state(SHAPES), config={"model_type": "tiny", "quantization_config": quantisation})
    with pytest.raises(CheckpointError, match="quantised"):
        check_options(base, {})


SCRIPT = """
from mergekit_imm import ArgumentError, Rounds
Rounds("org/base")
try:
    Rounds("org/base", options={"keep": ["typo"]})
except ArgumentError as error:
    print(error)
"""


def test_of_a_base_on_a_hub_no_weights_are_loaded(base: Path, tmp_path: Path) -> None:
    write_model(base, random_state({"w": (1024, 1024), "v": (4,), "u": (4,)}))
    with fake_hub() as hub:
        hub.add("org/base", files_of(base))
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        env |= {"PYTHONPATH": str(Path(mergekit_imm.__file__).parents[1]), "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_ENDPOINT": hub.url}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
        assert '"typo"] matches none of the 3 tensor names' in done.stdout
        assert hub.sent() < (base / "model.safetensors").stat().st_size / 2


def test_a_dry_run_of_a_live_model_reads_headers_and_changes_nothing(base: Path) -> None:
    model = torch.nn.Module()
    for name, tensor in random_state({"w": (4, 4)}, seed=1).items():
        model.register_parameter(name, torch.nn.Parameter(tensor))
    write_model(base, {"w": torch.full((4, 4), float("nan"))})
    weight = model.get_parameter("w")
    before = weight.detach().clone()
    assert merge_into(model, base, dry_run=True).tensors == {"merged": 1}
    write_model(base, {"w": torch.zeros(4, 5)})
    with pytest.raises(MismatchError, match="shapes must be equal"):
        merge_into(model, base, dry_run=True)
    assert same_bits(weight.detach(), before)
