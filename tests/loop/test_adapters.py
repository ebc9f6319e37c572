"""Adapters in loops: what the callback and `Rounds` leave of them, by TRL, PEFT, transformers and the formulas."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file

import reference
from adapters import KINDS as ADAPTERS
from checkpoints import State, read_model, same_bits, write_model
from commands import HUNG
from loops import CONFIG
from lora_trainer import ALPHA, DROP, Seen, load, sft_trainer
from mergekit_imm import (
    ArgumentError,
    IMMCallback,
    MismatchError,
    NonFiniteError,
    OutputError,
    Rounds,
    merge_checkpoints,
)
from mergekit_imm.live.merge_adapter import merge_adapter
from mergekit_imm.loop.commands import CommandError
from mergekit_imm.loop.run import run_loop
from mergekit_imm.loop.state import from_dict
from models import LAYOUTS, new_model
from models import load as load_whole
from thorough import others


@pytest.fixture
def base(tmp_path: Path) -> Path:
    new_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quietly(function: Any, *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def assert_same(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not same_bits(one[name], other[name])] == []


def peft_merge(base: Path, adapter: Path) -> State:
    """Return what PEFT itself makes of a saved adapter, in float32."""
    model = quietly(peft.PeftModel.from_pretrained, load(base, torch.float32), str(adapter))
    return dict(quietly(model.merge_and_unload).state_dict())


def naive(base: State, sft: State, dtype: torch.dtype, start: State | None = None, **options: Any) -> State:
    """Return the merge of Eq. 6 with a mask, by the formulas."""
    return {
        name: reference.merge_tensors(
            tensor, sft[name].float(), None if start is None else start[name], dtype, name=name, **options
        )
        for name, tensor in base.items()
    }


@pytest.mark.parametrize("kind", ["full", "lora", *others("dora"), "tokens", "embeddings"])
@pytest.mark.parametrize("dtype", [torch.float32, *others(torch.bfloat16)], ids=str)
def test_trl_s_trainer_holds_the_merged_model_and_nothing_else(
    base: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """What it saves is `merge_checkpoints` of what was trained, bit for bit, and PEFT's merge within rounding."""
    callback = IMMCallback(base, merge_adapter=True, alpha=ALPHA, drop=DROP)
    seen = Seen(tmp_path / "sft")
    trainer = sft_trainer(load(base, dtype), tmp_path, kind, seen, callback)
    quietly(trainer.train)
    trainer.save_model(str(tmp_path / "merged"))
    merge_checkpoints(base, tmp_path / "sft", tmp_path / "expected", alpha=ALPHA, drop=DROP, dtype=dtype)
    merged = read_model(tmp_path / "merged")
    assert_same(merged, read_model(tmp_path / "expected"))
    assert not list((tmp_path / "merged").glob("adapter*"))

    sft = read_model(tmp_path / "sft") if kind == "full" else peft_merge(base, tmp_path / "sft")
    formula = naive(read_model(base), sft, torch.float32, alpha=ALPHA, drop=DROP)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-7, 1e-4)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.float(), formula[name], rtol=rtol, atol=atol)
    changed = [name for name, tensor in read_model(base).items() if not torch.equal(tensor.float(), sft[name].float())]
    assert len(changed) >= (2 if kind == "tokens" else 4)

    # In memory there is the same model, without adapter, in the dtype it was loaded in.
    assert_same(dict(callback.model.state_dict()), merged)
    assert not any("lora" in name for name, _ in trainer.model.named_modules())
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    assert kind == "full" or trainer.model.get_base_model() is callback.model
    assert_same(dict(load_whole(tmp_path / "merged", "llama", dtype=dtype).state_dict()), merged)
    tokens = torch.arange(6)[None]
    again = load(tmp_path / "merged", dtype).eval()(tokens).logits
    assert torch.equal(again, callback.model.eval()(tokens).logits)


@pytest.mark.parametrize("kind", ["lora", *others("full", "dora", "tokens", "embeddings", "fsdp2")])
def test_each_of_two_ranks_holds_the_merge_of_what_they_trained(base: Path, tmp_path: Path, kind: str) -> None:
    script = Path(__file__).parents[1] / "support" / "lora_trainer.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(tmp_path),
    }
    for rank in "01":
        (tmp_path / rank).mkdir()
    done = subprocess.run(
        [*command, str(tmp_path), kind], env=environment, capture_output=True, text=True, check=False, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr[-3000:]
    given = (base, tmp_path / f"{kind}-sft-0", tmp_path / "expected")
    merge_checkpoints(*given, alpha=ALPHA, drop=DROP, dtype="float32")
    for folder in (f"{kind}-0", f"{kind}-1", *([f"{kind}-by-trainer"] if kind != "fsdp2" else [])):
        assert_same(read_model(tmp_path / folder), read_model(tmp_path / "expected"))


TIED_APART: dict[str, tuple[str, dict[str, Any]]] = {
    "a tied head trained whole": ("qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    "a tie trained whole": ("qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}
MANY = {**ADAPTERS, **TIED_APART}
FEW = ("experts", "biases of factors", "a tie trained whole")


def wrapped(base: Path, layout: str, options: dict[str, Any], dtype: torch.dtype, noise: float = 0.05) -> Any:
    """Return a PEFT model whose trained tensors are random."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = LAYOUTS[layout].auto.from_pretrained(base, dtype=dtype)
        found = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **options}))
        with torch.no_grad():
            for parameter in found.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * noise)
    return found


@pytest.mark.parametrize("kind", [*FEW, *others(*(kind for kind in MANY if kind not in FEW))])
def test_rounds_give_the_bits_of_a_merge_of_the_saved_adapter(tmp_path: Path, kind: str) -> None:
    layout, options = MANY[kind]
    model = new_model(layout)
    model.config.tie_word_embeddings = LAYOUTS[layout].tied
    model.save_pretrained(tmp_path / "base")
    adapted = wrapped(tmp_path / "base", layout, options, torch.bfloat16)
    quietly(adapted.save_pretrained, tmp_path / "adapter")
    numbers: dict[str, Any] = {"alpha": 0.3, "drop": 0.5, "seed": 2}
    after = Rounds(tmp_path / "base", **numbers).merge(adapted, tmp_path / "live")
    assert (after.iteration, after.start) == (1, tmp_path / "live")
    live = read_model(tmp_path / "live")
    for dtype in {tensor.dtype for tensor in live.values()}:  # transformers holds some tensors in float32
        merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / str(dtype), dtype=dtype, **numbers)
        expected = read_model(tmp_path / str(dtype))
        assert sorted(live) == sorted(expected)
        assert_same(
            {name: tensor for name, tensor in live.items() if tensor.dtype == dtype},
            {name: tensor for name, tensor in expected.items() if live[name].dtype == dtype},
        )
    state = load_whole(tmp_path / "live", layout).state_dict()  # an end of a tie is what is stored for it
    assert [name for name in live if name in state and not same_bits(state[name], live[name])] == []
    said = json.loads((tmp_path / "live" / "config.json").read_text()).get("tie_word_embeddings")
    assert kind not in TIED_APART or said is False  # older transformers would tie them again
    held = {(tensor.data_ptr(), tensor.dtype) for tensor in adapted.parameters()}
    assert held == {(tensor.data_ptr(), tensor.dtype) for tensor in adapted.get_base_model().parameters()}
    assert not list((tmp_path / "live").glob("adapter*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_tie_whose_ends_stayed_equal_is_one_tensor_still(tmp_path: Path, dtype: torch.dtype) -> None:
    """Both copies were trained to the same values, maybe in float32; each is merged once, as one tensor."""
    layout, options = TIED_APART["a tie trained whole"]
    new_model(layout).save_pretrained(tmp_path / "base")
    adapted = wrapped(tmp_path / "base", layout, options, torch.bfloat16, noise=0)
    name = "model.embed_tokens.weight"
    base = read_model(tmp_path / "base")[name]
    trained = (base.float() + torch.randn(base.shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    for each in (adapted.get_input_embeddings(), adapted.get_output_embeddings()):
        each.weight.data = trained.clone()
    Rounds(tmp_path / "base", alpha=0.3, drop=0.5).merge(adapted, tmp_path / "live")
    expected = reference.merge_tensors(base, trained, None, torch.bfloat16, name=name, alpha=0.3, drop=0.5)
    live = read_model(tmp_path / "live")
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.bfloat16}
    assert same_bits(live[name], expected)
    assert same_bits(live.get("lm_head.weight", expected), expected)


def test_the_next_round_wraps_the_merged_model_again(base: Path, tmp_path: Path) -> None:
    """Two rounds in one process, and nothing but merged models on disk: the formulas, round by round."""
    options = {"target_modules": ["q_proj", "down_proj"]}
    numbers: dict[str, Any] = {"alpha": 0.25, "drop": 0.5}
    rounds = Rounds(base, **numbers, options={})
    model = load(base, torch.bfloat16)
    start = read_model(base)
    for number in (0, 1):
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
        torch.manual_seed(number)
        adapted = quietly(peft.get_peft_model, model, config)
        quietly(adapted.save_pretrained, tmp_path / f"adapter-{number}")
        before = base if number == 0 else tmp_path / "round-0"
        sft = peft_merge(before, tmp_path / f"adapter-{number}")
        rounds = rounds.merge(adapted, tmp_path / f"round-{number}")
        merged = read_model(tmp_path / f"round-{number}")
        formula = naive(read_model(base), sft, torch.float32, start, iteration=number, **numbers)
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor.float(), formula[name], rtol=2**-7, atol=1e-3)
        model, start = adapted.get_base_model(), merged
        assert_same(dict(model.state_dict()), merged)
    merge_checkpoints(
        base, tmp_path / "adapter-1", tmp_path / "expected", start=tmp_path / "round-0", iteration=1, **numbers
    )
    assert_same(start, read_model(tmp_path / "expected"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "base",
        "adapter-0",
        "adapter-1",
        "round-0",
        "round-1",
        "expected",
    }


LORA = {"target_modules": ["q_proj"]}


def test_a_save_that_fails_is_not_merged_twice(base: Path, tmp_path: Path) -> None:
    adapted = wrapped(base, "llama", LORA, torch.bfloat16)
    rounds = Rounds(base, drop=0)

    def fails(*_: Any) -> None:
        raise ValueError("no luck")

    with pytest.raises(OutputError, match="call save_merged"):
        rounds.merge(adapted, tmp_path / "out", save=fails)
    state = {name: tensor.clone() for name, tensor in adapted.get_base_model().state_dict().items()}
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ArgumentError, match="is already merged but not saved"):
            rounds.merge(model, tmp_path / "out")
    rounds.save_merged(adapted, tmp_path / "out")
    assert_same(read_model(tmp_path / "out"), state)
    with pytest.raises(MismatchError, match="holds no adapter: it was merged or unloaded"):
        Rounds(base).merge(adapted, tmp_path / "other")


def test_a_model_that_is_not_the_start_is_refused_before_anything_changes(base: Path, tmp_path: Path) -> None:
    """Otherwise the start's training would be lost: the result is the base and the adapter's change alone."""
    new_model("llama").save_pretrained(tmp_path / "start")
    state = read_model(tmp_path / "start")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    write_model(tmp_path / "start", state, config=json.loads((base / "config.json").read_text()))
    adapted = wrapped(tmp_path / "start", "llama", LORA, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    match = (
        r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of the model with the adapter is not that of base .*, first"
        r" at element 101; give as `start` the model"
    )
    with pytest.raises(MismatchError, match=match):
        Rounds(base).merge(adapted, tmp_path / "out")
    callback = IMMCallback(base, merge_adapter=True)
    with pytest.raises(MismatchError, match=match):
        callback.on_train_begin(None, None, None, model=adapted)
    assert_same(dict(adapted.state_dict()), before)
    assert not (tmp_path / "out").exists()
    rounds = Rounds(base, start=tmp_path / "start", iteration=1, alpha=0.25, drop=0.5)
    quietly(adapted.save_pretrained, tmp_path / "adapter")
    merged = read_model(Path(rounds.merge(adapted, tmp_path / "out").start or ""))
    assert_same(merged, read_model(Path(rounds.merge(tmp_path / "adapter", tmp_path / "expected").start or "")))


@pytest.mark.parametrize("what", ["nan", "loose", "two", "merged", "vocabulary"])
def test_what_cannot_be_merged_is_refused_and_the_adapter_stays(base: Path, tmp_path: Path, what: str) -> None:
    adapted = wrapped(base, "llama", LORA, torch.bfloat16)
    layer = adapted.base_model.model.model.layers[0]
    error: type[Exception] = MismatchError
    if what == "nan":
        layer.self_attn.q_proj.lora_B["default"].weight.data[0, 0] = float("nan")
        error, match = NonFiniteError, "is NaN or infinite"
    elif what == "loose":
        layer.input_layernorm.weight.requires_grad_(True)
        match = r"input_layernorm\.weight' is trained, but is not part of the adapter 'default', .*modules_to_save"
    elif what == "two":
        quietly(adapted.add_adapter, "other", peft.LoraConfig(r=2, **LORA))
        adapted.base_model.set_adapter(["default", "other"])
        error, match = ArgumentError, r"has 2 active adapters \(default, other\)"
    elif what == "merged":
        quietly(adapted.merge_adapter)
        match = r"is merged into its layers; call unmerge_adapter\(\)"
    else:
        model = load(base, torch.bfloat16)
        quietly(model.resize_token_embeddings, 100)
        adapted = quietly(peft.get_peft_model, model, peft.LoraConfig(r=4, **LORA))
        match = r"is \[96, 32\] in .* and \[100, 32\] in .*use merge_checkpoints with vocab"
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    with pytest.raises(error, match=match):
        Rounds(base).merge(adapted, tmp_path / "out")
    assert {name for name, tensor in adapted.state_dict().items() if not same_bits(tensor, before[name])} == set()
    assert not list(tmp_path.glob("out*"))


def test_adapters_that_only_peft_can_merge_are_merged_by_it(base: Path, tmp_path: Path) -> None:
    """PiSSA moves a part of the base into the adapter; IA3 scales activations."""
    for number, config in enumerate(
        (
            peft.LoraConfig(r=4, init_lora_weights="pissa", **LORA),
            peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        )
    ):
        adapted = quietly(peft.get_peft_model, load(base, torch.float32), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.1)
        merge_adapter(adapted, base, dry_run=True, drop=0)
        plain = quietly(peft.get_peft_model, load(base, torch.float32), config)
        plain.load_state_dict(adapted.state_dict())
        sft = dict(quietly(plain.merge_and_unload).state_dict())
        Rounds(base, drop=0, alpha=0.25).merge(adapted, tmp_path / f"out-{number}")
        formula = naive(read_model(base), sft, torch.float32, alpha=0.25, drop=0.0)
        assert_same(read_model(tmp_path / f"out-{number}"), formula)


TRAIN = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
model, output, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if number == 1 and not Path("failed").exists():
    Path("failed").touch()
    sys.exit("out of memory")
output.mkdir(exist_ok=True)
draw = np.random.default_rng(number)
names = [name.removesuffix(".weight") for name in load_file(model / "model.safetensors") if "layers" in name]
tensors = {}
for name in names:
    tensors[f"base_model.model.{name}.lora_A.weight"] = draw.normal(size=(2, 64)).astype(np.float32)
    tensors[f"base_model.model.{name}.lora_B.weight"] = draw.normal(size=(64, 2)).astype(np.float32)
save_file(tensors, output / "adapter_model.safetensors")
config = {"peft_type": "LORA", "r": 2, "lora_alpha": 0.01, "base_model_name_or_path": str(model)}
(output / "adapter_config.json").write_text(json.dumps(config))
"""


def test_a_loop_of_commands_merges_adapters_in_place_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No round holds base and adapter as a model of its own."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(9)
    names = ("model.embed.weight", "model.layers.0.w.weight", "model.layers.1.w.weight")
    Path("base").mkdir()
    save_file({name: draw.normal(size=(64, 64)).astype(np.float32) for name in names}, "base/model.safetensors")
    Path("base/config.json").write_text(json.dumps(CONFIG))
    Path("train.py").write_text(TRAIN)
    train = f"{shlex.quote(sys.executable)} train.py {{model}} {{output}} {{round}}"
    asked = from_dict({"base": "base", "train": train, "rounds": 3, "alpha": "0.2,0.5,0.8", "drop": "0.5"})
    with pytest.raises(CommandError, match="out of memory"):
        run_loop(asked, "run")
    run_loop(asked, "run")

    base = read_model(Path("base"))
    start = base
    for number, alpha in enumerate((0.2, 0.5, 0.8)):
        place = Path(f"run/round-{number}")
        factors = read_factors(place / "sft" / "adapter_model.safetensors")
        expected = {}
        for name, tensor in base.items():
            pair = factors.get(name.removesuffix(".weight"))
            delta = None if pair is None else torch.from_numpy(reference.product(*pair, 0.01 / 2))
            expected[name] = reference.merge_tensors(
                tensor,
                start[name] if delta is None else delta,
                start[name],
                torch.float32,
                name=name,
                alpha=alpha,
                drop=0.5,
                iteration=number,
                is_delta=delta is not None,
            )
        start = read_model(place / "merged")
        assert_same(start, expected)
        models = sorted(str(path.relative_to(place)) for path in place.rglob("*.safetensors"))
        assert models == ["merged/model.safetensors", "sft/adapter_model.safetensors"]
    assert sorted(path.name for path in Path().iterdir()) == ["base", "failed", "run", "train.py"]


def read_factors(path: Path) -> dict[str, tuple[Any, Any]]:
    from safetensors.numpy import load_file

    found = load_file(path)
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in found}
    return {
        m: (found[f"base_model.model.{m}.lora_B.weight"], found[f"base_model.model.{m}.lora_A.weight"]) for m in modules
    }
