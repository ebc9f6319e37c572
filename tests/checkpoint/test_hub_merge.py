"""Merges of hub ids: a dry run, a refusal, a merge, and the same again offline from the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

import mergekit_imm
from checkpoints import files_of, random_state, write_model
from commands import HUNG
from fake_hub import FakeHub, commit_of, fake_hub
from mergekit_imm import merge_checkpoints

SHAPES = {f"model.layers.{i}.w": (100, 300) for i in range(2)}
CONFIG = {"model_type": "x", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """base and sft, and the result of merging them locally, for use as a start."""
    names = list(SHAPES)
    base = write_model(tmp_path / "base", random_state(SHAPES, seed=1), shards=[names[:1], names[1:]], config=CONFIG)
    side = {"tokenizer.json": "{}", "modeling_x.py": "raise SystemExit"}
    sft = write_model(tmp_path / "sft", random_state(SHAPES, seed=2), config=CONFIG, side=side)
    merge_checkpoints(base, sft, tmp_path / "start", seed=5)
    other = random_state({**SHAPES, "extra.w": (3,)}, seed=3)
    return {
        "base": base,
        "sft": sft,
        "start": tmp_path / "start",
        "other": write_model(tmp_path / "other", other, config=CONFIG),
    }


@pytest.fixture
def hub(models: dict[str, Path]) -> Iterator[FakeHub]:
    with fake_hub() as server:
        for name, folder in models.items():
            server.add(f"org/{name}", files_of(folder))
        yield server


def imm_merge(home: Path, hub: FakeHub | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with its own cache; offline if there is no hub."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= {"PYTHONPATH": str(Path(mergekit_imm.__file__).parents[1]), "HF_HOME": str(home)}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HF_ENDPOINT": hub.url} if hub else {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-m", "mergekit_imm", "merge", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HUNG)


def test_a_pair_on_a_hub_is_planned_refused_merged_and_merged_again_offline(
    tmp_path: Path, models: dict[str, Path], hub: FakeHub
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    planned = imm_merge(home, hub, "org/base", "org/sft@main", "--dry-run", "--json", "-o", str(out))
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["status"] == "dry run"
    assert not out.exists()
    assert not list(home.rglob("*.safetensors"))

    refused = imm_merge(home, hub, "org/base", "org/other", "-o", str(out))
    assert refused.returncode == 1
    assert "'extra.w'" in refused.stderr.splitlines()[-1]
    assert not list(home.rglob("*.safetensors")), "refused from headers, before anything was downloaded"

    done = imm_merge(home, hub, "org/base", "org/sft@main", "-o", str(out))
    assert done.returncode == 0, done.stderr
    local = tmp_path / "local"
    merge_checkpoints(models["base"], models["sft"], local)
    own = {"README.md", "imm_recipe.json", "imm_report.json"}
    got, expected = files_of(out), files_of(local)
    assert set(got) == set(expected)
    assert all(got[name] == expected[name] for name in set(got) - own)
    inputs = json.loads(got["imm_recipe.json"])["inputs"]
    assert inputs["base"]["commit"] == commit_of("org/base", files_of(models["base"]))
    assert inputs["sft"]["path"] == "org/sft@main"

    again = imm_merge(home, None, "org/base", "org/sft@main", "-o", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    assert files_of(tmp_path / "again") == got
    assert "already merged" in imm_merge(home, None, "org/base", "org/sft@main", "-o", str(out)).stdout


def test_a_path_that_does_not_exist_is_named_with_its_role(tmp_path: Path, models: dict[str, Path]) -> None:
    for dry_run in (["--dry-run"], []):
        done = imm_merge(tmp_path, None, "models/bse", str(models["sft"]), "-o", str(tmp_path / "out"), *dry_run)
        assert done.returncode == 1
        assert done.stderr.startswith(
            "error: base models/bse: there is no such folder here, and as a hub id it is not in"
        )


def test_what_was_left_out_is_not_missed_in_the_cache(tmp_path: Path, models: dict[str, Path], hub: FakeHub) -> None:
    hub.add("org/headed", {**files_of(models["sft"]), "value_head.bin": b"anything"})
    home = tmp_path / "home"
    for place, name in ((hub, "online"), (None, "offline")):
        done = imm_merge(
            home, place, "org/base", "org/headed", "--leave-out", "value_head.bin", "-o", str(tmp_path / name)
        )
        assert done.returncode == 0, done.stderr
    weights = {name: content for name, content in files_of(tmp_path / "online").items() if "safetensors" in name}
    assert weights.items() <= files_of(tmp_path / "offline").items()


def test_weights_without_which_a_model_does_not_load_are_not_to_be_left_out(tmp_path: Path, hub: FakeHub) -> None:
    hub.add("org/bin", {"modules.json": b"[]", "pytorch_model.bin": b"anything"})
    refused = imm_merge(tmp_path / "home", hub, "org/bin", "org/sft", "-o", str(tmp_path / "out"))
    assert refused.returncode == 1
    assert "hf download org/bin" in refused.stderr
    assert "--leave-out" not in refused.stderr


def test_a_torch_file_beside_weights_on_a_hub_is_not_read(
    tmp_path: Path, models: dict[str, Path], hub: FakeHub
) -> None:
    files = files_of(models["sft"])
    files["trained.safetensors"] = files.pop("model.safetensors")
    hub.add("org/both", {**files, "pytorch_model.bin": b"anything"})
    done = imm_merge(tmp_path / "home", hub, "org/base", "org/both", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    merge_checkpoints(models["base"], models["sft"], tmp_path / "local")
    weights = {name: each for name, each in files_of(tmp_path / "local").items() if name.endswith(".safetensors")}
    assert weights.items() <= files_of(tmp_path / "out").items()


def test_a_start_on_a_hub_tells_its_round(tmp_path: Path, models: dict[str, Path], hub: FakeHub) -> None:
    out = tmp_path / "out"
    for extra in (["--dry-run"], []):
        arguments = [str(models["base"]), str(models["sft"]), "--start", "org/start", *extra, "--json", "-o", str(out)]
        done = imm_merge(tmp_path / "home", hub, *arguments)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["parameters"]["iteration"] == 1
    history = json.loads((out / "imm_recipe.json").read_text())["history"]
    assert [recipe["parameters"]["seed"] for recipe in history] == [5]


def test_an_adapter_on_a_hub_is_planned_and_merged(tmp_path: Path, hub: FakeHub) -> None:
    base = write_model(tmp_path / "plain", random_state({"model.layers.0.q.weight": (8, 8)}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shapes = {f"base_model.model.model.layers.0.q.lora_{x}.weight": s for x, s in (("A", (2, 8)), ("B", (8, 2)))}
    save_file(random_state(shapes), adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    hub.add("org/lora", files_of(adapter))
    out = tmp_path / "out"
    for extra in (["--dry-run"], []):
        done = imm_merge(tmp_path / "home", hub, str(base), "org/lora", *extra, "-o", str(out))
        assert done.returncode == 0, done.stderr
    merge_checkpoints(base, adapter, tmp_path / "local")
    assert files_of(out)["model.safetensors"] == files_of(tmp_path / "local")["model.safetensors"]
    hub.add("org/ia3", {**files_of(adapter), "adapter_config.json": b'{"peft_type": "IA3"}'})
    refused = imm_merge(tmp_path / "home", hub, str(base), "org/ia3", "-o", str(tmp_path / "other"))
    assert "is a IA3 adapter" in refused.stderr


def test_a_model_in_memory_and_its_base_on_a_hub(tmp_path: Path, models: dict[str, Path], hub: FakeHub) -> None:
    script = """
        import sys, torch
        from pathlib import Path
        from checkpoints import read_model
        from mergekit_imm import MergeError, merge_into
        from modules import Model
        sft, expected, home = map(Path, sys.argv[1:])
        model = Model(read_model(sft))
        try:
            merge_into(model, "org/other")
        except MergeError as error:
            print(error)
        print(list(home.rglob("*.safetensors")))
        print(merge_into(model, "org/base", seed=5).tensors)
        print(all(torch.equal(t, model.state_dict()[n]) for n, t in read_model(expected).items()))
    """
    places = (models["sft"], models["start"], tmp_path / "home")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    folders = (Path(mergekit_imm.__file__).parents[1], Path(__file__).parents[1] / "support")
    path = os.pathsep.join(map(str, folders))
    env |= {"PYTHONPATH": path, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, places)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HUNG)
    assert run.returncode == 0, run.stderr
    refused, downloaded, told, same = run.stdout.splitlines()
    assert "'extra.w'" in refused
    assert (downloaded, told, same) == ("[]", "{'merged': 2}", "True")


def test_parts_of_a_model_come_from_a_hub_too(tmp_path: Path) -> None:
    """A module in a sub-folder, a head beside the model, and weights in PyTorch files only."""
    home, out = tmp_path / "home", tmp_path / "out"
    with fake_hub() as server:
        for seed, role in enumerate(("base", "sft")):
            folder = write_model(tmp_path / role, random_state(SHAPES, seed=seed), config=CONFIG)
            for name in ("2_Dense/model.safetensors", "value_head.safetensors"):
                (folder / name).parent.mkdir(exist_ok=True)
                save_file(random_state({"head.w": (4, 8)} if "/" in name else {"v.w": (4,)}, seed=seed), folder / name)
            server.add(f"org/{role}", files_of(folder))
        server.add("org/pickled", files_of(tmp_path / "sft") | {"mm_projector.bin": b"anything"})
        planned = imm_merge(home, server, "org/base", "org/sft", "--dry-run", "--json", "-o", str(out))
        assert planned.returncode == 0, planned.stderr
        files = ["2_Dense/model.safetensors", "model.safetensors", "value_head.safetensors"]
        assert sorted(json.loads(planned.stdout)["files"]) == files
        assert not list(home.rglob("*.safetensors"))
        done = imm_merge(home, server, "org/base", "org/sft", "-o", str(out))
        assert done.returncode == 0, done.stderr
        refused = imm_merge(home, server, "org/base", "org/pickled", "-o", str(tmp_path / "other"))
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].endswith("or leave the file out, --leave-out 'mm_projector.bin'")
        without = ["--leave-out", "mm_projector.bin", "-o", str(tmp_path / "other")]
        left_out = imm_merge(home, server, "org/base", "org/pickled", *without)
        assert left_out.returncode == 0, left_out.stderr
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "local")
    for found in (out, tmp_path / "other"):
        assert {name: (found / name).read_bytes() for name in files} == {
            name: (tmp_path / "local" / name).read_bytes() for name in files
        }
    again = imm_merge(home, None, "org/base", "org/sft", "-o", str(out))
    assert (again.returncode, "already merged" in again.stdout) == (0, True), again.stderr
