"""--as-adapter: the merge of an adapter as an adapter, by PEFT, transformers and the formulas."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import KINDS, Options, train
from checkpoints import files_of, read_model
from mergekit_imm import (
    ArgumentError,
    CheckpointError,
    MergeError,
    MismatchError,
    NonFiniteError,
    Rounds,
    VerifyError,
    iter_merged,
    merge_checkpoints,
    verify,
)
from mergekit_imm.model.tensor_names import layer_key
from mergekit_imm.options.options import MergeOptions
from mergekit_imm.plan.describe import check
from models import LAYOUTS
from thorough import others

WHOLE = "embedding and head, whole"
MANY: dict[str, tuple[str, Options]] = {
    **{kind: asked for kind, asked in KINDS.items() if kind != "DoRA"},
    WHOLE: ("qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}
FEW = ("rslora, patterns", "biases of factors", "tokens", WHOLE)


def loaded(folder: Path, layout: str, adapter: Path | None = None) -> Any:
    """Return a model of transformers in float32, with an adapter on it if given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LAYOUTS[layout].auto.from_pretrained(folder, dtype=torch.float32)
        return model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter))


@pytest.mark.parametrize("kind", [*FEW, *others(*(kind for kind in MANY if kind not in FEW))])
@pytest.mark.parametrize("alpha", [0.3, *others(0.0)])
def test_peft_makes_the_merged_model_of_it(tmp_path: Path, kind: str, alpha: float) -> None:
    """The oracle: base + (1 - alpha) (PEFT's merge of the trained adapter - base), in float64."""
    layout, options = MANY[kind]
    train(tmp_path, layout, options)
    report = merge_checkpoints(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=alpha, drop=0, as_adapter=True, verify=True
    )
    assert (report.status, report.files, report.verified) == ("merged", ["adapter_model.safetensors"], True)
    verify(tmp_path / "out")
    base, trained = read_model(tmp_path / "base"), read_model(tmp_path / "merged")
    with_adapter = loaded(tmp_path / "base", layout, tmp_path / "out").eval()
    tokens = torch.arange(8)[None]
    # The tiny deepseek cannot run; of a tie PEFT changes one end before it merges, and both after.
    runs = layout != "deepseek_v3"
    logits = with_adapter(input_ids=tokens).logits if runs and "tied" not in kind else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it unties
        merged = with_adapter.merge_and_unload()
        merged.save_pretrained(tmp_path / "by-peft")
    logits = merged(input_ids=tokens).logits if runs and logits is None else logits
    changed = 0
    for name, tensor in read_model(tmp_path / "by-peft").items():
        like = base.get(name, base.get(LAYOUTS[layout].embedding))  # an untied head was the embedding
        assert like is not None
        expected = alpha * like.double() + (1 - alpha) * trained[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=2e-7)
        changed += not torch.equal(tensor, like.float())
    assert changed >= 2
    merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole", alpha=alpha, drop=0, dtype="float32")
    if logits is not None:
        whole = loaded(tmp_path / "whole", layout).eval()(input_ids=tokens).logits
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), *KINDS["rslora, patterns"], dtype=torch.bfloat16)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def scalings_of(base: Path, adapter: Path) -> dict[str, float]:
    """Return the scaling of each module, as PEFT has it."""
    modules = loaded(base, "llama", adapter).named_modules()
    return {name: each.scaling["default"] for name, each in modules if isinstance(each, peft.tuners.lora.LoraLayer)}


def test_the_factors_are_the_same_bytes_and_the_scaling_is_in_the_config(trained: Path, tmp_path: Path) -> None:
    """The scaling of every layer is the trained one times 1 - alpha: exactly, where a power of two."""
    for alpha, share in ((0.5, 0.5), (0.75, 0.25), (0.3, 0.7)):
        out = tmp_path / str(alpha)
        report = merge_checkpoints(trained / "base", trained / "adapter", out, alpha=alpha, drop=0, as_adapter=True)
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained / "adapter", out))
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert before.keys() == after.keys()
        assert report.tensors == {"merged": 0, "kept": 0, "taken": len(before), "copied": 0}
        one, other = config_of(trained / "adapter"), config_of(out)
        changed = {key for key in one if one[key] != other[key]}
        assert changed == {"lora_alpha", "alpha_pattern"} == {*report.config_changes}
        scalings = [scalings_of(trained / "base", folder) for folder in (trained / "adapter", out)]
        assert len(scalings[0]) == 14
        wrong = 2**-51 if alpha == 0.3 else 0
        for name, scaling in scalings[0].items():
            assert abs(scalings[1][name] - share * scaling) <= wrong * scaling, name
        assert sum(file.stat().st_size for file in out.iterdir()) < 100_000


@pytest.mark.parametrize("how", ["importance", "layer_factors"])
def test_each_layer_has_its_factor(trained: Path, tmp_path: Path, how: str) -> None:
    given: dict[str, Any] = {
        "importance": {"importance": {"0": 1.0, "1": 3.0}},
        "layer_factors": {"layer_factors": {"0": 0.5, "1": 1.5, "outside": 1.0}},
    }[how]
    merge_checkpoints(
        trained / "base", trained / "adapter", tmp_path / "out", alpha=0.3, drop=0, as_adapter=True, **given
    )
    factors = {"model.layers.0": 0.5, "model.layers.1": 1.5}
    sft = read_model(trained / "merged")
    model = loaded(trained / "base", "llama", tmp_path / "out").merge_and_unload().state_dict()
    for name, tensor in read_model(trained / "base").items():
        factor = factors.get(layer_key(name) or "", 1.0)
        expected = tensor.double() + 0.7 * factor * (sft[name].double() - tensor.double())
        torch.testing.assert_close(model[name].double(), expected, rtol=1e-6, atol=2e-7)


def test_a_module_whose_name_ends_another_s_has_its_own_factor(trained: Path, tmp_path: Path) -> None:
    """PEFT takes the first pattern that ends a name; the inputs of the merge are one model under two names."""
    names = ("layers.0.w", "layers.1.w", "deep.layers.0.w", "deep.layers.1.w")
    draw = torch.Generator().manual_seed(1)
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"{name}.weight": torch.randn(4, 4, generator=draw) for name in names}, tmp_path / "base" / "model.safetensors"
    )
    factors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape, generator=draw)
        for name in names
        for side, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    given = {"layers.0": 0.5, "layers.1": 1.0, "deep.layers.0": 2.0, "deep.layers.1": 4.0}
    merge_checkpoints(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
        alpha=0.5,
        drop=0,
        as_adapter=True,
        layer_factors=given,
    )
    patterns = config_of(tmp_path / "out")["alpha_pattern"]
    from peft.utils.other import get_pattern_key

    found = {name: patterns[get_pattern_key(patterns.keys(), name)] for name in names}
    assert found == {f"{layer}.w": 8 * 0.5 * factor for layer, factor in given.items()}
    assert all(type(value) is int for value in found.values())


def test_what_travels_is_the_adapter_s(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "adapter" / "optimizer.pt").write_text("x")
    shutil.copytree(trained / "base", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", drop=0, as_adapter=True)
    assert {*files_of(tmp_path / "out")} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "imm_recipe.json",
        "imm_report.json",
        "tokenizer.json",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "# A merged adapter" in card
    assert "--drop 0" in card
    assert "--as-adapter -o OUT" in card
    recipe = json.loads((tmp_path / "out" / "imm_recipe.json").read_text())
    assert recipe["parameters"]["as_adapter"] is True
    assert recipe["config_changes"]["lora_alpha"] == 4
    again = merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", drop=0, as_adapter=True)
    assert again.status == "already merged"
    # It is an adapter like any other: merged again it is the whole model.
    merge_checkpoints(tmp_path / "base", tmp_path / "out", tmp_path / "one", alpha=0, drop=0, dtype="float32")
    merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "other", drop=0, dtype="float32")
    for name, tensor in read_model(tmp_path / "one").items():
        torch.testing.assert_close(tensor, read_model(tmp_path / "other")[name], rtol=1e-6, atol=1e-7)


def test_a_change_of_a_byte_is_found(trained: Path, tmp_path: Path) -> None:
    for name, at in (("adapter_model.safetensors", -5), ("adapter_config.json", 30), ("README.md", 10)):
        out = tmp_path / name
        merge_checkpoints(trained / "base", trained / "adapter", out, drop=0, as_adapter=True)
        content = bytearray((out / name).read_bytes())
        content[at] ^= 1
        (out / name).write_bytes(content)
        with pytest.raises(VerifyError, match=r"lora_|adapter_config\.json|README\.md"):
            verify(out)


def test_a_pickled_adapter_and_a_sweep(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "adapter" / "adapter_model.bin")
    reports = merge_checkpoints(
        trained / "base",
        tmp_path / "adapter",
        str(tmp_path / "out-{alpha}"),
        alpha=[0.25, 0.5],
        drop=0,
        as_adapter=True,
    )
    assert [Path(report.out).name for report in reports] == ["out-0.25", "out-0.5"]
    for report, alpha in zip(reports, (6, 4), strict=True):
        found = load_file(Path(report.out) / "adapter_model.safetensors")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert config_of(Path(report.out))["lora_alpha"] == alpha
        verify(report.out)


def test_a_dry_run_and_a_check_say_what_would_be_written(trained: Path, tmp_path: Path) -> None:
    given = (trained / "base", trained / "adapter")
    report = merge_checkpoints(*given, tmp_path / "out", drop=0, as_adapter=True, dry_run=True)
    assert (report.status, report.files, report.config_changes["lora_alpha"]) == (
        "dry run",
        ["adapter_model.safetensors"],
        4,
    )
    assert {kind["action"] for kind in report.kinds} == {"take"}
    assert not list(tmp_path.iterdir())
    assert check(*given, MergeOptions(drop=0, as_adapter=True)).problems == []
    (problem,) = check(trained / "base", trained / "merged", MergeOptions(drop=0, as_adapter=True)).problems
    assert "is not an adapter" in problem


KILLED = """
import os, sys
from mergekit_imm import merge_checkpoints
from mergekit_imm.engine import write_folder
write_folder._write_beside = lambda *_: os.kill(os.getpid(), 9)
merge_checkpoints(*sys.argv[1:], drop=0, as_adapter=True)
"""


def test_an_interrupted_one_goes_on(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(trained / "base", trained / "adapter", tmp_path / "whole", drop=0, as_adapter=True)
    arguments = [str(trained / "base"), str(trained / "adapter"), str(out)]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.partial" / "adapter_model.safetensors").exists()
    report = merge_checkpoints(trained / "base", trained / "adapter", out, drop=0, as_adapter=True)
    assert report.status == "merged"
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"drop": 0.2}, ArgumentError, r"as_adapter=True is given with drop=0\.2: .*; give drop=0, or leave out"),
        ({"drop": [0, 0.5]}, ArgumentError, r"drop=0\.5"),
        ({"alpha": 1}, ArgumentError, "alpha=1: the result is the base"),
        ({"sparsify": "trim"}, ArgumentError, "as_adapter=True and sparsify are both given"),
        ({"dtype": "float32"}, ArgumentError, "as_adapter=True and dtype are both given"),
        ({"max_shard_size": "5GB"}, ArgumentError, "and max_shard_size are both given"),
        ({"keep": ["norm"]}, ArgumentError, "and keep are both given"),
        ({"take": ["norm"]}, ArgumentError, "and take are both given"),
        ({"vocab": "sft"}, ArgumentError, "and vocab are both given"),
        (
            {"start": "merged", "iteration": 1},
            ArgumentError,
            r"given with start .*, which differs from the base",
        ),
        ({"sft": "merged"}, ArgumentError, r"but sft .*merged is not an adapter; leave out as_adapter=True"),
        ({"sft": "dora"}, CheckpointError, "has DoRA for 'model.layers.0.self_attn.q_proj.weight'"),
        ({"sft": "beside"}, CheckpointError, r"has weights beside the adapter, value_head\.safetensors"),
        (
            {"sft": "nan"},
            NonFiniteError,
            r"lora_B\.weight' of sft .* has 1 NaN or infinite of .*index 2",
        ),
        ({"sft": "other"}, MismatchError, r"is this the model that the adapter was trained on\?"),
        ({"layer_factors": {"0": 0.0, "1": 1.0}}, ArgumentError, "the factor of 'model.layers.0.*' is 0"),
    ],
)
def test_what_is_no_adapter_is_refused_in_one_line(
    trained: Path, tmp_path: Path, options: Options, error: type[MergeError], match: str
) -> None:
    given = dict(options)
    sft = trained / "adapter"
    if "sft" in options:
        sft = trained / "merged" if options["sft"] == "merged" else tmp_path / str(given["sft"])
        del given["sft"]
    if sft.name == "dora":
        train(tmp_path / "dora-run", "llama", {"target_modules": ["q_proj"], "use_dora": True})
        shutil.copytree(tmp_path / "dora-run" / "adapter", sft)
    elif sft.parent == tmp_path:
        shutil.copytree(trained / "adapter", sft)
        state = load_file(sft / "adapter_model.safetensors")
        name = next(name for name in state if "lora_B" in name)
        if sft.name == "beside":
            save_file({"lm_head.weight": torch.zeros(96, 32)}, sft / "value_head.safetensors")
        elif sft.name == "nan":
            state[name].view(-1)[2] = float("nan")
        else:
            state[name] = state[name][:-1].clone()
        save_file(state, sft / "adapter_model.safetensors")
    if "start" in given:
        given["start"] = trained / str(given["start"])
    before = {*tmp_path.iterdir()}
    with pytest.raises(error, match=match) as raised:
        merge_checkpoints(trained / "base", sft, tmp_path / "out-{drop}", **{"drop": 0, "as_adapter": True, **given})
    assert "\n" not in str(raised.value)
    assert {*tmp_path.iterdir()} == before
    if sft.name == "nan":
        merge_checkpoints(trained / "base", sft, tmp_path / "out", drop=0, as_adapter=True, allow_nonfinite=True)


def test_experts_have_one_factor(tmp_path: Path) -> None:
    train(tmp_path, *KINDS["experts"])
    given = (tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(MismatchError, match=r"changes experts, .*leave out importance and layer_factors"):
        merge_checkpoints(*given, drop=0, as_adapter=True, layer_factors="lines:0.5,1")


def test_only_merges_into_a_folder_can_write_one(trained: Path) -> None:
    with pytest.raises(TypeError, match="as_adapter"):
        iter_merged(trained / "base", trained / "adapter", as_adapter=True)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match="'as_adapter' is not an option of Rounds"):
        Rounds(trained / "base", drop=0, options={"as_adapter": True})
