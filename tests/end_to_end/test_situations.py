"""Situations drawn at random are merged, and compared with transformers, PEFT and the formulas; see also `run`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from .judge import judged
from .run import tried
from .situations import Situation, from_json, situations, to_json

# A plain one of each kind, and those that were once got wrong.
KNOWN = (
    '{"rounds": [{"drop": 0.5}, {"drop": 0.5}]}',
    '{"architecture": "qwen2", "ends": "tied", "base": {"form": "sharded", "every_name": true},'
    ' "rounds": [{"drop": 0.5, "sft": {"form": "bin sharded"}}], "by_command": true}',
    '{"architecture": "gpt2", "ends": "tied", "rounds": [{"adapter": {"targets": ["c_attn", "c_fc"]}, "drop": 0.5}]}',
    '{"architecture": "qwen3_moe", "rounds": [{"adapter": {"targets": ["q_proj"], "experts": "parameters"}}]}',
    '{"architecture": "mixtral", "rounds": [{"sft": {"original": false}, "drop": 0.5}]}',
    '{"architecture": "gemma3", "ends": "tied", "rounds": [{"sft": {"original": false}, "drop": 0.5}]}',
    '{"ends": "tied", "rounds": [{"ends": "untied", "drop": 0.5}, {"drop": 0.5}]}',
    '{"ends": "tied", "rounds": [{"adapter": {"targets": ["q_proj"], "saved": ["embedding", "head"]}}]}',
    '{"ends": "apart", "rounds": [{"drop": 0.5}]}',
    '{"rounds": [{"rows": 4, "vocab": "sft", "drop": 0.5}, {"adapter": {"targets": ["q_proj"]}, "vocab": "sft"}]}',
    '{"architecture": "distilbert", "ends": "tied", "rounds": [{"adapter": {"targets": ["k_lin"], "head": true}}]}',
    '{"architecture": "bert", "ends": "tied", "rounds": [{"adapter": {"targets": ["dense"], "head": true,'
    ' "bias": "lora_only"}}]}',
    '{"ends": "tied", "rounds": [{"ends": "untied", "rows": 4, "vocab": "sft"},'
    ' {"adapter": {"targets": ["down_proj"]}, "vocab": "sft"}]}',
    '{"architecture": "t5", "ends": "tied", "base": {"every_name": true}, "rounds": [{"drop": 0.5}]}',
)


@pytest.mark.parametrize("text", KNOWN)
def test_a_known_situation_merges(text: str, tmp_path: Path) -> None:
    verdict = judged(from_json(text), tmp_path)
    assert verdict.outcome == "merged", verdict


def test_situations_drawn_at_random_are_merged_right_or_refused_for_a_reason() -> None:
    """Of each seed the same situations, as many of each outcome as this says at least."""
    outcomes = Counter[str]()

    @seed(20)
    @settings(
        max_examples=30,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(situations())
    def judge(situation: Situation) -> None:
        verdict = tried(situation)
        outcomes[verdict.outcome.partition(":")[0]] += 1
        assert verdict.failure is None, f"{verdict.failure}\n{to_json(situation)}"

    judge()
    assert outcomes["merged"] > sum(outcomes.values()) / 2, outcomes


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(situations())
def test_a_situation_is_its_json(situation: Situation) -> None:
    text = to_json(situation)
    assert from_json(text) == situation
    assert json.loads(text) == json.loads(to_json(from_json(text)))
