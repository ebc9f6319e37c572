"""The callback of transformers' Trainer, with real trainings of tiny models."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from checkpoints import State, read_model, same_bits
from commands import HUNG
from mergekit_imm import (
    ArgumentError,
    CheckpointError,
    IMMCallback,
    MergeError,
    MismatchError,
    merge_checkpoints,
)
from models import load, new_model
from thorough import others


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sixteen rows of tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(12) * (row + 3)) % 90
        return {"input_ids": tokens, "labels": tokens}


def trainer(model: Any, folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder / "trained"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "logging_strategy": "no",
        **arguments,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.Trainer(
            model, transformers.TrainingArguments(**options), train_dataset=Data(), callbacks=list(callbacks)
        )


def train(each: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each.train()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    new_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def assert_same(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not same_bits(one[name], other[name])] == []


def test_at_the_end_the_model_is_what_the_trained_one_merges_to(base: Path, tmp_path: Path) -> None:
    plain = trainer(load(base, "llama", dtype=torch.bfloat16), tmp_path)
    train(plain)
    plain.save_model(str(tmp_path / "sft"))
    merge_checkpoints(base, tmp_path / "sft", tmp_path / "expected", alpha=0.3, drop=0.5, seed=7)
    callback = IMMCallback(base, alpha=0.3, drop=0.5, seed=7)
    merged = trainer(load(base, "llama", dtype=torch.bfloat16), tmp_path, callback)
    train(merged)
    merged.save_model(str(tmp_path / "merged"))
    assert_same(read_model(tmp_path / "merged"), read_model(tmp_path / "expected"))
    assert (callback.merges, callback.model) == (1, merged.model)
    assert not all(same_bits(tensor, read_model(base)[name]) for name, tensor in read_model(tmp_path / "sft").items())


@pytest.mark.parametrize(("every", "merges"), [("epoch", 2), *others((1, 4)), (3, 1)])
def test_it_merges_at_the_given_times(base: Path, tmp_path: Path, every: str | int, merges: int) -> None:
    """Training continues from the merged model: with alpha 1 a merge undoes all training before it."""
    callback = IMMCallback(base, every=every, alpha=1.0, reference="base")
    each = trainer(load(base, "llama", dtype=torch.bfloat16), tmp_path, callback)
    train(each)
    assert callback.merges == merges
    each.save_model(str(tmp_path / "merged"))
    same = [same_bits(tensor, read_model(base)[name]) for name, tensor in read_model(tmp_path / "merged").items()]
    assert all(same) == (every != 3)  # the last of four steps comes after the merge


def test_rounds_of_one_training_have_masks_of_their_own(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mergekit_imm")
    train(
        trainer(
            load(base, "llama", dtype=torch.bfloat16),
            tmp_path,
            IMMCallback(base, every="epoch", reference="base", iteration=5),
        )
    )
    assert [record.message.rpartition(" ")[2] for record in caplog.records] == ["5", "6"]


@pytest.mark.parametrize("kind", [*others("ddp"), "fsdp2"])
def test_each_rank_merges_what_it_has(base: Path, tmp_path: Path, kind: str) -> None:
    script = Path(__file__).parents[1] / "support" / "trainer_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [*command, str(tmp_path), kind], env=environment, capture_output=True, text=True, check=False, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained = read_model(tmp_path / f"{kind}-sft-0")
    assert not any(torch.equal(tensor, read_model(base)[name].float()) for name, tensor in trained.items())
    merge_checkpoints(base, tmp_path / f"{kind}-sft-0", tmp_path / "expected", alpha=0.3, drop=0.5, dtype="float32")
    for rank in (0, 1):
        assert_same(read_model(tmp_path / f"{kind}-{rank}"), read_model(tmp_path / "expected"))


def adapted(base: Path) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(load(base, "llama", dtype=torch.float32), config)


def test_adapters_are_left_alone_and_that_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = IMMCallback(base, start=base, iteration=2)
    model = adapted(base)
    train(trainer(model, tmp_path, callback))
    assert callback.merges == 0
    assert "the model has adapters: IMMCallback merges nothing" in caplog.text
    assert f"`imm-merge {base} ADAPTER --start {base} --iteration 2 -o OUT`" in caplog.text
    model.save_pretrained(tmp_path / "adapter")  # still an adapter that can be merged
    merge_checkpoints(base, tmp_path / "adapter", tmp_path / "out")


def test_adapters_are_merged_when_asked(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However the model is saved, the result is the merge of the trained adapter."""
    plain = adapted(base)
    train(trainer(plain, tmp_path))
    plain.save_pretrained(tmp_path / "adapter")
    merge_checkpoints(base, tmp_path / "adapter", tmp_path / "expected", drop=0.5, dtype="float32")
    callback = IMMCallback(base, merge_adapter=True, drop=0.5)
    model = adapted(base)
    each = trainer(model, tmp_path, callback)
    train(each)
    assert "trainer.save_model now saves the merged LlamaForCausalLM, not an adapter" in caplog.text
    callback.model.save_pretrained(tmp_path / "by-callback")
    each.save_model(str(tmp_path / "by-trainer"))
    each.accelerator.unwrap_model(each.model).save_pretrained(tmp_path / "unwrapped")
    model.save_pretrained(tmp_path / "gathered", state_dict=model.state_dict())  # as for a sharded model
    for folder in ("by-callback", "by-trainer", "unwrapped", "gathered"):
        assert_same(read_model(tmp_path / folder), read_model(tmp_path / "expected"))
        assert not list((tmp_path / folder).glob("adapter*"))
        loaded = load(tmp_path / folder, "llama", dtype=torch.float32)
        assert_same(dict(loaded.state_dict()), dict(callback.model.state_dict()))


def test_adapters_that_cannot_be_merged_are_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    """Adapters inside a transformers model, and prompt tuning, have no merge_and_unload."""
    whole = load(base, "llama", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = load(base, "llama", dtype=torch.float32)
        own.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        prompt = peft.get_peft_model(whole, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for model in (own, prompt):
        each = trainer(model, tmp_path, IMMCallback(base, merge_adapter=True))
        with pytest.raises(ArgumentError, match="has no merge_and_unload"):
            train(each)
        assert each.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": "step"}, "every is 'step'"),
        ({"every": 0}, "every is 0"),
        ({"every": True}, "every is True"),
        ({"every": "epoch"}, "give reference='base'"),
        ({"every": 3, "reference": "base", "merge_adapter": True}, "an adapter can only be merged at the end"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        IMMCallback("base", **options)


FILE = "no-such-importance.json"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"drop": 1.0}, "drop is 1.0"),
        ({"aplha": 0.5}, "'aplha' is not an option of IMMCallback; did you mean 'alpha'?"),
        ({"vocab": "sft"}, "'vocab' is not an option of IMMCallback; its options are allow_nonfinite, alpha, "),
        ({"dry_run": True}, "'dry_run' is not an option of IMMCallback"),
        ({"keep": ["lm_haed"]}, r'"lm_haed"\] matches none of'),
        ({"no_drop": ["lm_haed"]}, r'"lm_haed"\] matches none of'),
        ({"keep": ["["]}, r'keep=\[r"\["\] is not a regular expression'),
        ({"keep": ["lm_head"], "take": ["lm_head"]}, "both kept and taken"),
        ({"rename": ["^language=modle"]}, "makes names with 'modle', and no tensor of base"),
        ({"importance": FILE}, f"importance file {FILE} cannot be read"),
        ({"importance": {"model.layers.7": 1.0}}, "no tensor of the model lies in layer 'model.layers.7'"),
        ({"layer_factors": FILE}, f"layer factors file {FILE} cannot be read"),
        ({"layer_factors": {"0": 1.0}}, "are given for 1 of 2: missing model.layers.1"),
        ({"layer_factors": {"0": 1e38, "1": 1.0}, "drop": 0.99}, "does not fit in float32"),
        ({"workers": 0}, "workers is 0"),
        ({"start": "nowhere"}, "start nowhere does not exist"),
        ({"start": "start"}, "has no imm_recipe.json with its round"),
    ],
)
def test_what_the_base_tells_is_refused_when_a_callback_is_made(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if options.get("start") == "start":
        new_model("llama").save_pretrained(tmp_path / "start")
    with pytest.raises(MergeError, match=match):
        IMMCallback("base", **options)


def test_an_adapter_on_a_quantised_model_is_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    """The result would be a quantised model, which cannot be merged."""
    model = adapted(base)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    each = trainer(model, tmp_path, IMMCallback(base, merge_adapter=True))
    with pytest.raises(MismatchError, match=r"mlp\.up_proj\.weight' of the model is torch\.float8_e4m3fn; quantised"):
        train(each)
    assert each.state.global_step == 0


def test_a_base_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        IMMCallback(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"take": ["lm_haed"]}, r'"lm_haed"\] matches none of'),  # the model might have such a tensor
        ({"rename": ["^language[.]=model."]}, "changes none of the"),
    ],
)
def test_what_the_model_tells_is_refused_before_the_first_step(
    base: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    each = trainer(load(base, "llama"), tmp_path, IMMCallback(base, **options))
    with pytest.raises(ArgumentError, match=match):
        train(each)
    assert each.state.global_step == 0


def test_a_model_that_is_not_the_base_s_is_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    new_model("qwen2").save_pretrained(tmp_path / "other")
    each = trainer(load(base, "llama"), tmp_path, IMMCallback(tmp_path / "other"))
    with pytest.raises(MismatchError):
        train(each)
    assert each.state.global_step == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_start_than_the_model_s_is_refused_before_the_first_step(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """A forgotten start would count what earlier rounds learned as this round's."""
    model = load(base, "llama")
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    model.save_pretrained(tmp_path / "round-0")
    later = load(tmp_path / "round-0", "llama", dtype=dtype)
    each = trainer(later, tmp_path, IMMCallback(base, iteration=1))
    with pytest.raises(
        MismatchError, match=r"'model\.norm\.weight' of sft model Llama.* is not that of base .*element 3; give as"
    ):
        train(each)
    assert each.state.global_step == 0
    wrong = trainer(
        load(base, "llama", dtype=dtype), tmp_path, IMMCallback(base, start=tmp_path / "round-0", iteration=1)
    )
    with pytest.raises(MismatchError, match=r"is not that of start .*element 3"):
        train(wrong)
    cured = IMMCallback(base, start=tmp_path / "round-0", iteration=1)
    train(trainer(later, tmp_path, cured))
    from_base = IMMCallback(base, reference="base", iteration=1)  # the delta is taken from the base: all is well
    train(trainer(load(tmp_path / "round-0", "llama", dtype=dtype), tmp_path, from_base))
    assert (cured.merges, from_base.merges) == (1, 1)


def test_a_training_that_resumes_is_no_other_start(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trainer(load(base, "llama"), tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    train(first)
    callback = IMMCallback(base, drop=0.5)
    each = trainer(load(base, "llama"), tmp_path, callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each.train(resume_from_checkpoint=str(tmp_path / "trained" / "checkpoint-2"))
    assert (each.state.global_step, callback.merges) == (4, 1)
    assert f"merged back towards {base}: " in caplog.text


def test_deepspeed_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    callback = IMMCallback(base)
    arguments = trainer(load(base, "llama"), tmp_path).args
    arguments.deepspeed = "config.json"
    with pytest.raises(ArgumentError, match="does not work with DeepSpeed"):
        callback.on_train_begin(arguments, None, None, model=load(base, "llama"))
