"""The recipes of the pages on trainers: TRL's trains a model; those for GPUs are called as their trainers call them."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from checkpoints import State, random_state, read_model, same_bits, write_model
from commands import HUNG
from loops import PYTHON, TRAINER
from mergekit_imm import CheckpointError, MergeError
from mergekit_imm.testing import naive_merge

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "trainers"
PAGE = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("trainers*.md")))
TRAINERS: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "scripts" / "trainers.json").read_text())
SHAPES = {"model.embed_tokens.weight": (16, 8), "model.layers.0.mlp.up_proj.weight": (8, 8)}


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Put a module in the place of one that is not installed, and its packages."""
    for end in [match.start() for match in re.finditer(r"\.", name)]:
        monkeypatch.setitem(sys.modules, name[:end], sys.modules.get(name[:end], types.ModuleType(name[:end])))
    module = sys.modules.get(name, types.ModuleType(name))
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def recorded(trainer: str, class_: str, **bodies: str) -> Any:
    """Make a class of a trainer with the signatures that its source has; `bodies` are what its methods do."""
    (methods,) = (
        {name.removeprefix(f"{class_}."): args for name, args in file.items() if name.startswith(f"{class_}.")}
        for file in TRAINERS[trainer]["hooks"].values()
        if any(name.startswith(f"{class_}.") for name in file)
    )
    lines = ["from __future__ import annotations", "import torch", f"class {class_}:"]
    for name, args in methods.items():
        word = "async def" if name == "send_weights" else "def"
        lines.append(f"    {word} {name}({args}): {bodies.get(name, 'return None')}")
    made: dict[str, Any] = {}
    exec("\n".join(lines), made)
    return made[class_]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a recipe."""
    monkeypatch.syspath_prepend(RECIPES)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(RECIPES)):
            del sys.modules[name]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """Write the base, and the model of the round before; return the state of the base."""
    monkeypatch.chdir(tmp_path)
    base = random_state(SHAPES, dtype=torch.float32)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "before", {name: tensor + 0.1 for name, tensor in base.items()})
    return base


def trained(start: str, folder: Path) -> State:
    """Write a model as a trainer does; return it."""
    state = {name: tensor + 0.02 for name, tensor in read_model(Path(start)).items()}
    write_model(folder, state)
    return state


def assert_merged(out: Path, sft: State, start: str, *, atol: float = 0.0, **options: Any) -> None:
    """Check a merged model against the naive formula, tensor by tensor: the same bits, or within `atol`."""
    base, begin, found = (read_model(each) for each in (Path("base"), Path(start), out))
    assert sorted(found) == sorted(base)
    for name, tensor in found.items():
        one, tuned, first = (each[name].float().numpy().ravel() for each in (base, sft, begin))
        expected = naive_merge(one, tuned, first, "F32", name=name, **options)
        wanted = torch.from_numpy(expected).view(tensor.shape)
        if atol:
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=atol)
        else:
            assert same_bits(tensor, wanted), name


def verl_config(**changes: Any) -> Any:
    checkpoint = {"save_contents": ["model", "optimizer", "extra", "hf_model"], "async_save": False, **changes}
    return SimpleNamespace(
        imm=SimpleNamespace(base="base", round=1),
        actor_rollout_ref=SimpleNamespace(
            model=SimpleNamespace(path="before"), actor=SimpleNamespace(checkpoint=SimpleNamespace(**checkpoint))
        ),
    )


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch, recipe: Any) -> Any:
    stub(
        monkeypatch,
        "verl.trainer.ppo.checkpoint_callback",
        CheckpointCallback=recorded("verl", "CheckpointCallback", __init__="self.config = config"),
    )
    return recipe("verl_callback").MergeAtEnd


def test_verl_merges_the_last_checkpoint_of_a_run_beside_it(verl: Any, models: State, tmp_path: Path) -> None:
    callback = verl(config=verl_config())
    trainer = SimpleNamespace(total_training_steps=4)
    for step in (2, 4):
        place = tmp_path / "run" / f"global_step_{step}"
        sft = trained("before", place / "actor" / "huggingface")
        callback.on_save(
            trainer=trainer, global_step=step, checkpoint_dir=str(place), async_save=False, something_new=None
        )
        assert (tmp_path / "run" / "merged").exists() == (step == 4)
    assert_merged(tmp_path / "run" / "merged", sft, "before", alpha=0.5, drop=0.2, iteration=1)


@pytest.mark.parametrize("changes", [{"save_contents": ["model", "extra"]}, {"async_save": True}])
def test_verl_is_refused_before_training_what_could_not_be_merged(verl: Any, models: State, changes: Any) -> None:
    with pytest.raises(ValueError, match="the merge needs hf_model"):
        verl(config=verl_config(**changes))


def test_verl_is_refused_a_missing_base_before_training(verl: Any, models: State) -> None:
    shutil.rmtree("base")
    with pytest.raises(CheckpointError, match="base"):
        verl(config=verl_config())


@pytest.mark.parametrize("rank", [0, -1])
def test_verl_s_engine_sends_the_merged_model_from_the_first_rank_alone(
    monkeypatch: pytest.MonkeyPatch, recipe: Any, models: State, rank: int
) -> None:
    engines: dict[str, Any] = {}
    made = recorded(
        "verl",
        "NCCLCheckpointEngine",
        __init__="self.rank, self.multi_sender = None, multi_sender",
        send_weights="self.sent = {name: tensor.clone() for name, tensor in weights}",
    )
    registry = recorded("verl", "CheckpointEngineRegistry")
    registry.register = lambda backend: lambda each: engines.setdefault(backend, each)
    stub(monkeypatch, "verl.checkpoint_engine", CheckpointEngineRegistry=registry, NCCLCheckpointEngine=made)
    recipe("verl_engine")
    engine = engines["nccl_merged"](is_master=rank == 0, bucket_size=1 << 20, base="base", alpha=0.25)
    assert engine.multi_sender is False
    engine.rank = rank
    sft = {name: tensor + 0.02 for name, tensor in models.items()}
    asyncio.run(engine.send_weights((pair for pair in sft.items()), global_steps=3))
    if rank:
        assert all(same_bits(engine.sent[name], tensor) for name, tensor in sft.items())
    else:
        write_model(Path("sent"), engine.sent)
        assert_merged(Path("sent"), sft, "base", alpha=0.25, drop=0.0)


def test_skyrl_saves_and_merges_at_the_end(
    monkeypatch: pytest.MonkeyPatch, recipe: Any, models: State, tmp_path: Path
) -> None:
    experiment = recorded(
        "SkyRL", "BasePPOExp", get_trainer="return self.made", run="return self.get_trainer(*range(8))"
    )
    experiment.made = recorded("SkyRL", "RayPPOTrainer", add_callback="self.callback = callback")()
    dispatch = recorded("SkyRL", "WorkerDispatch")()
    config = SimpleNamespace(
        trainer=SimpleNamespace(
            export_path=str(tmp_path / "export"), policy=SimpleNamespace(model=SimpleNamespace(path="before"))
        )
    )
    stub(monkeypatch, "ray", remote=lambda **_: lambda function: function)
    stub(monkeypatch, "skyrl.train.config", SkyRLTrainConfig=None)
    stub(monkeypatch, "skyrl.train.entrypoints.main_base", BasePPOExp=experiment)
    stub(monkeypatch, "skyrl.train.utils", initialize_ray=None, validate_cfg=None)
    stub(monkeypatch, "skyrl.train.utils.callbacks", TrainingCallback=recorded("SkyRL", "TrainingCallback"))
    module = recipe("skyrl_callback")
    module.run(config, "base", 2)
    made: dict[str, State] = {}
    real = type(dispatch).save_hf_model

    def save(self: Any, *arguments: Any) -> None:
        real(self, *arguments)  # has the recorded signature
        assert (arguments[0], arguments[2]) == ("policy", "tokenizer")
        made["sft"] = trained("before", Path(arguments[1]))

    monkeypatch.setattr(type(dispatch), "save_hf_model", save)
    trainer = SimpleNamespace(cfg=config, dispatch=dispatch, tokenizer="tokenizer")
    experiment.made.callback.on_train_end(trainer, object(), object())
    assert_merged(tmp_path / "export" / "merged", made["sft"], "before", alpha=0.5, drop=0.2, iteration=2)
    shutil.rmtree("base")
    with pytest.raises(MergeError):  # before training
        module.run(config, "base", 2)


def run_recipe(file: str, *arguments: str) -> None:
    """Run a recipe in this folder, on the CPU, without network."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(Path("cache").absolute()),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(RECIPES / file), *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=HUNG)


def test_trl_trains_and_merges_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint at the last step, before the merge, is the fine-tuned model."""
    monkeypatch.chdir(tmp_path)
    run_recipe("tiny.py")
    for number, start in enumerate(["base", "round-0"]):
        out = f"round-{number}"
        run_recipe("trl_sft.py", "base", start, "data.jsonl", out, str(number))
        (checkpoint,) = Path(f"{out}-training").glob("checkpoint-*")
        assert_merged(Path(out), read_model(checkpoint), start, alpha=0.5, drop=0.2, iteration=number)
    _, info = transformers.AutoModelForCausalLM.from_pretrained("round-1", output_loading_info=True)
    assert not any(info.values())


def test_trl_merges_two_rounds_of_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fine-tuned model is PEFT's own merge of the saved adapter in float32, which rounds once more."""
    monkeypatch.chdir(tmp_path)
    run_recipe("tiny.py")
    for number, start in enumerate(["base", "lora-0"]):
        out = f"lora-{number}"
        run_recipe("trl_lora.py", "base", start, "data.jsonl", out, str(number))
        (checkpoint,) = Path(f"{out}-training").glob("checkpoint-*")
        model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT asks transformers for what has another name now
            tuned = peft.PeftModel.from_pretrained(model, str(checkpoint))
        tuned.merge_and_unload().save_pretrained("sft")
        sft = read_model(Path("sft"))
        assert not all(same_bits(tensor, read_model(Path(start))[name].float()) for name, tensor in sft.items())
        assert_merged(Path(out), sft, start, atol=1e-7, alpha=0.5, drop=0.2, iteration=number)


FAKE = """#!{python}
import pathlib, subprocess, sys
arguments = dict(zip(sys.argv[1:], sys.argv[2:] + [""]))
pathlib.Path("options").write_text("\\n".join(each for each in sys.argv if each.startswith("--")))
model, output = (arguments[name] for name in {names!r})
subprocess.run([*{trainer!r}, "train", model, output, "0"], check=True)
if "--save" in arguments:
    pathlib.Path(arguments["--save"]).mkdir()
"""


@pytest.mark.parametrize(
    ("name", "file", "program", "names"),
    [
        ("OpenRLHF", "openrlhf.sh", "deepspeed", ("--model.model_name_or_path", "--ckpt.output_dir")),
        ("slime", "slime.sh", "python3", ("--hf-checkpoint", "--save-hf")),
        ("open-instruct", "open_instruct.sh", "accelerate", ("--model_name_or_path", "--output_dir")),
    ],
)
def test_a_loop_around_a_trainer_gives_it_options_that_it_has(
    models: State, tmp_path: Path, name: str, file: str, program: str, names: tuple[str, str]
) -> None:
    for folder in ("base", "before"):
        (tmp_path / folder / "config.json").write_text('{"model_type": "tiny"}')
        (tmp_path / folder / "tokenizer.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / program
    fake.write_text(
        FAKE.format(python=sys.executable, names=names, trainer=[shlex.split(PYTHON)[0], *shlex.split(TRAINER)])
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", str(RECIPES / file)], env=environment, check=True, capture_output=True, timeout=HUNG)
    merged = [tmp_path / "run" / f"round-{number}" / "merged" for number in range(3)]
    sft = {each: tensor + torch.tensor(0.01) for each, tensor in read_model(merged[1]).items()}
    assert_merged(merged[2], sft, str(merged[1]), alpha=0.5, drop=0.2, iteration=2)
    used = set((tmp_path / "options").read_text().split()) - {"--module"}  # deepspeed's own
    (known,) = TRAINERS[name]["options"].values()
    assert used == set(known)
    assert not (tmp_path / "run" / "round-2" / "sft.megatron").exists()


def test_the_page_has_the_recipes_as_they_are() -> None:
    for path in RECIPES.iterdir():
        if path.is_file():
            assert path.read_text(encoding="utf-8") in PAGE, f"{path.name} is not on a page"


@pytest.mark.parametrize("name", TRAINERS)
def test_the_page_names_the_versions_and_the_commands_that_ran(name: str) -> None:
    trainer = TRAINERS[name]
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| [{name}]("))
    assert trainer["version"] in row
    assert ("| yes, one round |" in row) == ("run" in trainer)
    flat = re.sub(r"\s*\\\n\s*", " ", PAGE)
    assert trainer.get("run", "") in flat
