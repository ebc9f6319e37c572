"""The text part of a vision model, saved alone under its names in the whole (Qwen3.5)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from checkpoints import read_model, same_bits
from mergekit_imm import MismatchError, dare_merge, merge_checkpoints, verify
from mergekit_imm.analysis.change import checkpoint_change
from models import fine_tuned

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text part")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model("qwen3_5", text_config=_TEXT, vision_config=_VISION)
        transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "base")
    text = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    fine_tuned(text, seed=1).save_pretrained(folder / "sft")
    return folder / "base", folder / "sft"


def test_it_is_merged_into_the_whole(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, sft = map(read_model, pair)
    assert set(sft) < set(base)
    merge_checkpoints(*pair, tmp_path / "out", keep=["visual"], drop=0.5)
    merged = read_model(tmp_path / "out")
    expected = dare_merge({name: base[name] for name in sft}, sft, drop=0.5)
    assert list(merged) == list(base)
    assert [n for n in merged if not same_bits(merged[n], expected.get(n, base[n]))] == []
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((pair[0] / "config.json").read_text())
    verify(tmp_path / "out")
    kind = transformers.AutoModelForImageTextToText
    model, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert same_bits(
        model.model.visual.blocks[0].mlp.linear_fc1.weight.data, base["model.visual.blocks.0.mlp.linear_fc1.weight"]
    )


def test_the_option_is_in_the_message(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"tensors are in base .* only, .*to let them through: keep=") as caught:
        merge_checkpoints(*pair, tmp_path / "out")
    (pattern,) = re.findall(r"--keep '?([^' ]+)'?$", caught.value.args[0])
    merge_checkpoints(*pair, tmp_path / "out", keep=[pattern])


def test_its_change_is_measured(pair: tuple[Path, Path]) -> None:
    base, sft = map(read_model, pair)
    found = checkpoint_change(*pair, keep=["visual"])
    assert list(found.layers) == ["model.language_model.layers.0", "model.language_model.layers.1"]
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert found.kinds["model.language_model.layers.1"]["q_proj"] == pytest.approx(
        float((sft[name] - base[name]).double().norm()), rel=1e-5
    )


def test_another_model_stays_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "sft"
    other.mkdir()
    (other / "model.safetensors").write_bytes((pair[1] / "model.safetensors").read_bytes())
    config = json.loads((pair[1] / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_next"}))
    with pytest.raises(MismatchError, match="must be one architecture"):
        merge_checkpoints(pair[0], other, tmp_path / "out", keep=["visual"])
