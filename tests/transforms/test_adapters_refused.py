"""LoRA adapters that are refused, and why."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import KINDS, Options, train
from checkpoints import read_model, write_model
from commands import subprocess_of
from mergekit_imm import ArgumentError, CheckpointError, MergeError, MismatchError, audit, merge_checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), *KINDS["rslora, patterns"], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter, but only LORA is supported; .*merge_and_unload"),
        ({"peft_type": None}, "is a None adapter"),
        ({"init_lora_weights": "pissa"}, "initialised by pissa, which changed its base"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "initialised by olora"),
        ({"init_lora_weights": "corda"}, "initialised by corda"),
        ({"init_lora_weights": "loftq"}, "initialised by loftq"),
        ({"init_lora_weights": "lora_ga"}, "initialised by lora_ga"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens"),
        ({"use_qalora": True}, "has use_qalora"),
        ({"target_parameters": "experts"}, "its target_parameters is not a list of names"),
        ({"use_bdlora": {"x": 1}}, "has use_bdlora"),
        ({"use_something_new": True}, "has use_something_new, an unknown setting"),
        ({"r": 0}, "its r is 0, not a positive number"),
        ({"r": "8"}, "its r is 8, not a positive number"),
        ({"lora_alpha": float("inf")}, "its lora_alpha is inf"),
        ({"rank_pattern": {"(": 2}}, "its rank_pattern is not a mapping of patterns"),
        ({"alpha_pattern": ["x"]}, "its alpha_pattern is not a mapping"),
        ({"r": 5}, "and rank 5"),
        ({"ensure_weight_tying": float("inf")}, "holds infinity or NaN"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(trained: Path, tmp_path: Path, change: Options, match: str) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for dry_run in (True, False):
        with pytest.raises(MergeError, match=match) as caught:
            merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out", dry_run=dry_run)
        assert str(caught.value).isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("lora_A.weight", "lora_A.weird"), "an unknown kind of tensor"),
        (("layers.1.self_attn.q_proj.lora_A", "layers.1.self_attn.q_proj.lora_X"), "an unknown kind of tensor"),
        (("layers.1.", "layers.7."), r"only, not in .*is this the model that the adapter was trained on\?"),
        (("lora_B", None), "has only one factor"),
    ],
)
def test_factors_that_fit_nothing_are_refused(
    trained: Path, tmp_path: Path, change: tuple[str, str | None], match: str
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    old, new = change
    save_file({n.replace(old, new or ""): t for n, t in state.items() if new is not None or old not in n}, path)
    with pytest.raises((CheckpointError, MismatchError), match=match):
        merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    state = read_model(trained / "base")
    wider = {n: torch.cat([t, t]) if "q_proj" in n else t for n, t in state.items()}
    write_model(tmp_path / "base", wider, config=json.loads((trained / "base" / "config.json").read_text()))
    with pytest.raises(MismatchError, match=r"q_proj\.weight' is BF16 \[64, 32\], but .*is this the model"):
        merge_checkpoints(tmp_path / "base", trained / "adapter", tmp_path / "out")


def test_an_adapter_is_no_base_and_no_start(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base .* holds an adapter; give the model it was trained on"):
        merge_checkpoints(trained / "adapter", trained / "base", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"start .* holds an adapter, not a whole model: merge it") as caught:
        merge_checkpoints(trained / "base", trained / "base", tmp_path / "out", start=trained / "adapter", iteration=1)
    command = re.findall(r"`imm-merge (.*)`", str(caught.value))[0]
    here = command.replace("MODEL", str(trained / "base")).replace("MERGED", str(tmp_path / "start"))
    ended = subprocess_of("merge", *shlex.split(here))
    assert ended.status == 0, ended.error
    merged, peft = read_model(tmp_path / "start"), read_model(trained / "merged")
    assert merged.keys() == peft.keys()
    assert all(torch.equal(tensor, peft[name].to(tensor.dtype)) for name, tensor in merged.items())
    given = (trained / "base", trained / "base", tmp_path / "out")
    assert merge_checkpoints(*given, start=tmp_path / "start").status == "merged"


def test_a_part_of_an_adapter_is_answered_with_what_is_missing(trained: Path, tmp_path: Path) -> None:
    lora = shutil.copytree(trained / "adapter", tmp_path / "lora")
    weights, config = lora / "adapter_model.safetensors", lora / "adapter_config.json"

    def refused(given: Path, match: str, **options: Any) -> None:
        for dry_run in (True, False):
            with pytest.raises(CheckpointError, match=match):
                merge_checkpoints(trained / "base", given, tmp_path / "out", dry_run=dry_run, iteration=1, **options)

    for file in (weights, config):
        refused(file, rf"sft {file} is a file of an adapter; give its folder, '{lora}'$")
        with pytest.raises(
            CheckpointError, match=r"base .* is a file of an adapter; .*give the model it was trained on"
        ):
            merge_checkpoints(file, trained / "base", tmp_path / "out")
    without = r"holds an adapter's weights, adapter_model\.safetensors, without adapter_config\.json, which says how"
    config.rename(tmp_path / "config.json")
    refused(lora, rf"sft {lora} {without}")
    refused(weights, rf"sft {weights} is a file of an adapter; its folder, '{lora}', {without}")
    refused(trained / "base", rf"start {lora} {without}", start=lora)
    with pytest.raises(CheckpointError, match=rf"merged {lora} holds an adapter: nothing is merged there"):
        audit(lora, trained / "base", trained / "base")
    (tmp_path / "config.json").rename(config)
    weights.unlink()
    refused(lora, r"holds adapter_config\.json without the adapter's weights, adapter_model\.safetensors; copy or")


def test_a_file_of_an_adapter_beside_a_model_is_not_answered_with_the_model(trained: Path, tmp_path: Path) -> None:
    both = shutil.copytree(trained / "base", tmp_path / "both")
    shutil.copytree(trained / "adapter", both, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"is a file of an adapter beside a model, in '\S+both'; move it and its"):
        merge_checkpoints(trained / "base", both / "adapter_model.safetensors", tmp_path / "out")


def test_options_that_need_a_whole_model_are_refused(trained: Path, tmp_path: Path) -> None:
    given = (trained / "base", trained / "adapter", tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"cannot be taken from sft .*adapter"):
        merge_checkpoints(*given, take=["q_proj"])
    write_model(tmp_path / "start", read_model(trained / "base"))
    with pytest.raises(ArgumentError, match=r"leave out reference=.base."):
        merge_checkpoints(*given, start=tmp_path / "start", iteration=1, reference="base")
    assert merge_checkpoints(*given, keep=["q_proj"]).tensors["kept"] == 2


def test_an_embedding_trained_apart_from_its_tied_head_is_refused(tmp_path: Path) -> None:
    """The head would change with it; if both are trained, or stay tied, it can be merged."""
    train(tmp_path / "apart", "qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]})
    with pytest.raises(CheckpointError, match=r"trained apart from the head that base .* ties to it; train both"):
        merge_checkpoints(tmp_path / "apart" / "base", tmp_path / "apart" / "adapter", tmp_path / "out")
    train(tmp_path / "both", "qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head"]})
    merge_checkpoints(tmp_path / "both" / "base", tmp_path / "both" / "adapter", tmp_path / "out", alpha=0, drop=0)
    out, factors = read_model(tmp_path / "out"), load_file(tmp_path / "both" / "adapter" / "adapter_model.safetensors")
    for end in ("model.embed_tokens.weight", "lm_head.weight"):
        trained = next(tensor for name, tensor in factors.items() if name.endswith(end))
        assert torch.equal(out[end], trained.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("layout", "options", "match"),
    [
        ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}, r"DoRA for '.*c_attn\.weight', a Conv1D, which is"),
        ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA for '.*', an embedding, which is not"),
        (
            "qwen2",
            {"target_modules": ["k_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
            "changes 'lm_head.weight' and 'model.embed_tokens.weight', which are one tensor",
        ),
        ("qwen2", {"target_modules": ["embed_tokens", "lm_head"]}, "which are one tensor; merge it first"),
    ],
)
def test_what_peft_alone_can_merge_is_refused(tmp_path: Path, layout: str, options: Options, match: str) -> None:
    train(tmp_path, layout, options)
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_values_that_are_not_finite_are_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state: dict[str, Tensor] = load_file(path)
    name = next(name for name in state if "layers.1.mlp.up_proj.lora_A" in name)
    state[name][0, 3] = torch.inf
    save_file(state, path)
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.up_proj\.weight' of sft .* has 64 NaN or infinite"):
        merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_square_parameter_alone_is_refused_as_its_sides_cannot_be_told_apart(tmp_path: Path) -> None:
    train(tmp_path, "gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]})
    with pytest.raises(
        CheckpointError, match=r"the orientation of '.*experts\.down_proj' is unknown, as it is square; merge it first"
    ):
        merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
