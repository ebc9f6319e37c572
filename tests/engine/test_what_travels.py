"""What a merged model has besides weights: side files, `use_cache`, the models named in its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from checkpoints import random_state, write_model
from mergekit_imm import merge_checkpoints
from mergekit_imm.checkpoint.model_files import is_side_file
from models import load, new_model
from refused import CONFIG, SHAPES

# Files of pipelines, encoders and processors, and some that only look like leftovers.
TRAVEL = """
scheduler/scheduler_config.json model_index.json modules.json sentence_bert_config.json
config_sentence_transformers.json 1_Pooling/config.json preprocessor_config.json processor_config.json
video_preprocessor_config.json optimizer_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
vocab.json merges.txt chat_template.jinja generation_config.json added_tokens.json tokenizer.model spiece.model
unigram.json vocab.txt params.json prompt_style.json image.png logo_loss.svg text_encoder/config.json
feature_extractor/preprocessor_config.json assets/latest.json tekken.json LICENSE NOTICE.txt USE_POLICY.md
dataset_infos.json label2id.json speakers.json
""".split()
# Leftovers of transformers, DeepSpeed, LLaMA-Factory, ms-swift, axolotl, LitGPT, torchtune, AutoTrain, verl, TRL.
STAY = """
training_args.bin trainer_state.json optimizer.pt optimizer.bin scheduler.pt scheduler.bin rng_state.pth
rng_state_0.pth scaler.pt all_results.json train_results.json eval_results.json runs/x/events.out.tfevents.1
checkpoint-5/config.json latest zero_to_fp32.py global_step5/x.json ds_config.json ds_config_zero3.json
training_args.yaml llamaboard_config.yaml running_log.txt trainer_log.jsonl training_loss.png training_eval_loss.png
generated_predictions.jsonl predict_results.json args.json sft_args.json rlhf_args.json logging.jsonl
additional_config.json images/train_loss.png images/eval_loss.png images/train_learning_rate.png axolotl_config.yml
debug.log tokens_state.json hyperparameters.yaml torchtune_config.yaml training_params.json fsdp_config.json
latest_checkpointed_iteration.txt completions/completions_00010.parquet slurm-123.out nohup.out logs/x.txt
swanlog/x.json mlruns/0/meta.yaml eval/similarity_evaluation_results.csv data_args.json
""".split()


@pytest.mark.parametrize("copy_code", [False, True])
def test_files_of_a_model_travel_and_those_of_training_stay(copy_code: bool) -> None:
    assert [path for path in TRAVEL if not is_side_file(path, copy_code=copy_code)] == []
    assert [path for path in STAY if is_side_file(path, copy_code=copy_code)] == []


def merged_config(tmp_path: Path, base: dict[str, Any], sft: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    for role, config in (("base", base), ("sft", sft)):
        write_model(tmp_path / role, random_state(SHAPES), config={**CONFIG, **config})
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    return json.loads((tmp_path / "out" / "config.json").read_text()), report.config_changes


OFF, ON = {"use_cache": False}, {"use_cache": True}


@pytest.mark.parametrize(
    ("base", "sft", "expected", "changes"),
    [
        (ON, OFF, ON, {"use_cache": True}),
        ({}, OFF, {}, {"use_cache": None}),
        (OFF, OFF, OFF, {}),
        (OFF, ON, ON, {}),
        (ON, {}, {}, {}),
        ({"text_config": ON}, {"text_config": OFF}, {"text_config": ON}, {"text_config.use_cache": True}),
        (
            {"text_config": {"a": 1}, **OFF},
            {"text_config": {"a": 1, **OFF}, **OFF},
            {"text_config": {"a": 1}, **OFF},
            {"text_config.use_cache": None},
        ),
        ({}, {"other_config": OFF}, {"other_config": OFF}, {}),
    ],
)
def test_a_cache_that_only_training_turned_off_is_on_again(
    tmp_path: Path, base: dict[str, Any], sft: dict[str, Any], expected: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert merged_config(tmp_path, base, sft) == ({**CONFIG, **expected}, changes)


def test_a_model_trained_without_a_cache_generates_with_one(tmp_path: Path) -> None:
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    model.config.use_cache = False  # as trainers with gradient checkpointing do
    model.save_pretrained(tmp_path / "sft")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert load(tmp_path / "sft", "llama").config.use_cache is False
    merged = load(tmp_path / "out", "llama")
    assert merged.config.use_cache is True
    assert merged(torch.tensor([[1, 2]])).past_key_values is not None
    assert isinstance(merged, transformers.PreTrainedModel)


def card_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard.load(out / "README.md").data.to_dict()
    return found


NAMED: list[tuple[str | None, bool]] = [
    ("Qwen/Qwen2.5-0.5B", True),
    ("meta-llama/Llama-3.1-8B", True),
    ("HuggingFaceTB/SmolLM2-135M", True),
    ("mistralai/Mistral-7B-v0.1", True),
    (None, False),
    ("", False),
    ("gpt2", False),
    ("./x", False),
    ("../a/b", False),
    ("/data/models/x", False),
    ("output/checkpoint-5", False),
    ("outputs/x", False),
    ("saves/qwen", False),
    ("models/Qwen2.5", False),
    ("out-3/x", False),
    ("checkpoints/run", False),
    ("my-run/checkpoint-500", False),
    ("my-run/epoch_3", False),
    ("my-run/final", False),
    ("exp1/sft", False),
    ("a/b/c", False),
    ("~/models", False),
    ("C:\\models\\x", False),
    ("org/name@main", False),
    ("merged/round-2", False),
    ("results/dpo", False),
]


@pytest.mark.parametrize(("named", "is_hub_id"), NAMED)
@pytest.mark.parametrize("by", ["config", "adapter"])
def test_the_card_names_hub_ids_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, named: str | None, is_hub_id: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {} if named is None or by == "adapter" else {"_name_or_path": named}
    write_model(Path("base"), random_state(SHAPES), config=CONFIG)
    sft = write_model(Path("team/sft"), random_state(SHAPES, seed=1), config={**CONFIG, **config})
    if by == "adapter":
        (sft / "model.safetensors").unlink()
        factors = {
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 8),
            "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(8, 2),
        }
        write_model(sft, factors)
        (sft / "model.safetensors").rename(sft / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": named}
        (sft / "adapter_config.json").write_text(json.dumps(said))
    merge_checkpoints("base", "team/sft", "out")
    data = card_of(Path("out"))
    assert data.get("base_model") == ([named] if is_hub_id else None)
    assert data.get("base_model_relation") == ("merge" if is_hub_id else None)
    assert data["tags"] == ["merge", "mergekit_imm", "imm"]
    card = Path("out/README.md").read_text()
    assert "| `base` | `base` |" in card
    assert "| `sft` | `team/sft` |" in card


def test_what_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("team/base"), random_state(SHAPES), config={**CONFIG, "_name_or_path": "Qwen/Qwen2.5-0.5B"})
    write_model(Path("team/sft"), random_state(SHAPES, seed=1), config={**CONFIG, "_name_or_path": "team/base"})
    merge_checkpoints("team/base", "team/sft", "out")
    assert card_of(Path("out"))["base_model"] == ["Qwen/Qwen2.5-0.5B"]
