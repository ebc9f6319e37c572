"""What mergekit's merges and ours have in common, to the bit: the tables of docs/from-mergekit.md.

    python docs/scripts/from_mergekit.py [--check]     renews the tables from from_mergekit.json
    python docs/scripts/from_mergekit.py --run         makes the merges: a minute or two on one core

mergekit runs in an environment of its own (`make .venv-peers/ready`, or its Python with --peers-python). The models
are those of the tutorial, a fine-tuning of the merged one, and an adapter.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from pages import DOCS, update

from results import table

RESULTS = Path(__file__).resolve().with_suffix(".json")
PEERS = DOCS.parent / ".venv-peers" / "bin" / "python"
MERGER = """
import json, sys
from importlib.metadata import version
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for out, content in json.load(open(sys.argv[1])).items():
    options = MergeOptions(quiet=True, lora_merge_cache="cache", random_seed=0)
    run_merge(MergeConfiguration.model_validate(content), out, options)
print(version("mergekit"))
"""
FLOAT32 = {"dtype": "float32", "out_dtype": "bfloat16"}


def model(name: str, weight: Any = None, **parameters: Any) -> dict[str, Any]:
    return {
        "model": "+".join(f"./{each}" for each in name.split("+")),
        "parameters": ({} if weight is None else {"weight": weight}) | parameters,
    }


def sft_alone(weight: Any = 0.5, start: str = "base", **parameters: Any) -> dict[str, Any]:
    return {"base_model": f"./{start}", "models": [model("sft", weight, **parameters)]}


MLP = [{"filter": "mlp", "value": 0.5}, {"value": 0}]
LINEAR = {"merge_method": "linear", "models": [model("base", 0.5), model("sft", 0.5)]}
ARITHMETIC = {"merge_method": "task_arithmetic"}
# In words, what mergekit is given, and the options of ours (after `imm-merge base sft`); both write bfloat16.
SAME: list[tuple[str, dict[str, Any], str]] = [
    ("`linear`, weights 0.5 and 0.5", LINEAR | FLOAT32, "--alpha 0.5 --drop 0"),
    ("the same, `dtype: bfloat16`", LINEAR | {"dtype": "bfloat16"}, "--alpha 0.5 --drop 0"),
    ("`linear`, weights 3 and 1 (`normalize` is on)",
     {"merge_method": "linear", "models": [model("base", 3.0), model("sft", 1.0)]} | FLOAT32, "--alpha 0.75 --drop 0"),
    ("`task_arithmetic`, `weight: 0.5`", ARITHMETIC | sft_alone() | FLOAT32, "--alpha 0.5 --drop 0"),
    ("the same, `weight: 0.7`", ARITHMETIC | sft_alone(0.7) | FLOAT32, "--alpha 0.3 --drop 0"),
    ("the same, `dtype: bfloat16`", ARITHMETIC | sft_alone(0.7) | {"dtype": "bfloat16"}, "--alpha 0.3 --drop 0"),
    ("`task_arithmetic`, `weight: 1`, `lambda: 0.5`",
     ARITHMETIC | sft_alone(1.0) | {"parameters": {"lambda": 0.5}} | FLOAT32, "--alpha 0.5 --drop 0"),
    ("`task_arithmetic`, `weight: 0.5`, `normalize: true`",
     ARITHMETIC | sft_alone() | {"parameters": {"normalize": True}} | FLOAT32, "--alpha 0 --drop 0"),
    ("`weight` by `filter: mlp`, else 0", ARITHMETIC | sft_alone(MLP) | FLOAT32,
     "--alpha 0.5 --drop 0 --keep '^(?!.*mlp)'"),
    ("`dare_linear`, base as a model, `base_model` the start",
     {"merge_method": "dare_linear", "base_model": "./start",
      "models": [model("base", 0.5, density=1.0), model("sft", 0.5, density=1.0)]} | FLOAT32,
     "--start start --iteration 1 --alpha 0.5 --drop 0"),
    ("`model: base+adapter`", {"merge_method": "linear", "models": [model("base", 0.5), model("base+adapter", 0.5)]}
     | FLOAT32, "--alpha 0.5 --drop 0"),
]  # fmt: skip
DARE = {"merge_method": "dare_linear", "dtype": "float32", "out_dtype": "float32"}
EQ_6 = DARE | sft_alone(0.5 / 0.8, density=0.8) | {"parameters": {"rescale": False}}


def run(peers: str) -> None:
    """Make all merges in a folder, and write what was found."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        make_models()
        jobs = {f"theirs-{i}": config for i, (_, config, _) in enumerate(SAME)}
        jobs["dare"] = DARE | sft_alone(0.5, density=0.8)
        jobs["dare-eq6"], jobs["dare-again"] = EQ_6, EQ_6
        jobs["dare-shards"] = EQ_6 | {"base_model": "./base-shards", "models": [model("sft", 0.625, density=0.8)]}
        some = [{"filter": "embed", "value": 1}, {"value": 0.8}]
        jobs["dare-some"] = EQ_6 | {"models": [model("sft", 0.625, density=some)]}
        more = [model("base-more", 0.5), model("sft-more", 0.5)]
        jobs["unknown"] = {"merge_method": "linear", "models": more} | FLOAT32
        version, said = mergekit(peers, jobs)
        same = [compared(i, *case) for i, case in enumerate(SAME)]
        retrain_adapter()
        mergekit(peers, {"retrained": SAME[-1][1]})
        found = {"mergekit": version, "same": same, "dare": dare(), "rest": rest(said)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def mergekit(peers: str, jobs: dict[str, Any]) -> tuple[str, str]:
    """Run mergekit; return its version, and what it said."""
    Path("jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [peers, "-c", MERGER, "jobs.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1], done.stderr


def ours(arguments: str, out: str) -> None:
    from mergekit_imm.cli.merge import merge_command

    merge_command([*shlex.split(arguments), "--quiet", "-o", out], standalone_mode=False)


def make_models() -> None:
    """Make base, start, sft and an adapter; copies in shards, and with tensors that no definition has."""
    import peft
    import torch
    import transformers
    from run_examples import file_of
    from safetensors.torch import load_file, save_file

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    Path("tiny.py").write_text(file_of(DOCS / "tutorial.md", "tiny.py"))
    subprocess.run([sys.executable, "tiny.py"], check=True)
    subprocess.run([sys.executable, "tiny.py", "base", "start"], check=True)
    subprocess.run([sys.executable, "tiny.py", "base", "sft"], check=True)
    settings = json.loads(Path("sft/tokenizer_config.json").read_text())
    Path("sft/tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    whole = transformers.AutoModelForCausalLM.from_pretrained("base", dtype="auto")
    whole.save_pretrained("base-shards", max_shard_size="300KB")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(whole, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.02)
    adapted.save_pretrained("adapter")
    for folder in ("base", "sft"):
        shutil.copytree(folder, f"{folder}-more")
        state = load_file(f"{folder}/model.safetensors")
        state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
        save_file(state, f"{folder}-more/model.safetensors", {"format": "pt"})


def weights(folder: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def compared(number: int, what: str, config: dict[str, Any], options: str) -> dict[str, Any]:
    """Merge with ours; count the elements that differ, and by how much at most."""
    sft = "adapter" if "adapter" in json.dumps(config) else "sft"
    command = f"base {sft} {options}"
    ours(command, f"ours-{number}")
    a, b = weights(f"theirs-{number}"), weights(f"ours-{number}")
    a.pop("lm_head.weight", None)  # tied
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    differ = sum(int((a[name] != tensor).sum()) for name, tensor in b.items())
    largest = max(float((a[name].float() - tensor.float()).abs().max()) for name, tensor in b.items())
    elements = sum(tensor.numel() for tensor in b.values())
    return {"what": what, "ours": f"imm-merge {command}", "elements": elements, "differ": differ, "largest": largest}


def dare() -> dict[str, Any]:
    """Compare what DARE keeps, and by what it is multiplied."""
    ours("base sft --alpha 0.5 --drop 0.2 --dtype float32", "ours-dare")
    ours("base-shards sft --alpha 0.5 --drop 0.2 --dtype float32", "ours-shards")
    base, mine = weights("base"), weights("ours-dare")
    found: dict[str, Any] = {}
    for name in ("dare", "dare-eq6"):
        theirs, factors = weights(name), []
        kept = both = elements = 0
        for key, tensor in mine.items():
            start = base[key].float()
            moved, own = theirs[key] - start, tensor - start
            common = (moved != 0) & (own != 0)
            kept += int((moved != 0).sum())
            both += int(common.sum())
            elements += moved.numel()
            factors.append(float((moved[common].double() / own[common].double()).median()))
        found[name] = {"kept": kept / elements, "both": both / elements, "factor": [min(factors), max(factors)]}
    again, shards = weights("dare-again"), weights("dare-shards")
    first = weights("dare-eq6")
    found["tensors"] = len(mine)
    found["again"] = sum(not first[key].equal(again[key]) for key in mine)
    found["shards"] = sum(not first[key].equal(shards[key]) for key in mine)
    ours("base sft --alpha 0.5 --drop 0.2 --dtype float32 --no-drop embed", "ours-some")
    for place, whole, other in (("theirs", first, "dare-some"), ("ours", mine, "ours-some")):
        some = weights(other)
        found[f"{place} some"] = sum("embed" not in key and not whole[key].equal(some[key]) for key in mine)
    found["ours shards"] = sum(not mine[key].equal(tensor) for key, tensor in weights("ours-shards").items())
    return found


def retrain_adapter() -> None:
    """Give the adapter other weights, in the same place."""
    from safetensors.torch import save_file

    save_file({name: 2 * tensor for name, tensor in weights("adapter").items()}, "adapter/adapter_model.safetensors")


def rest(said: str) -> dict[str, Any]:
    """Look at tensors that have no definition, at other files, and at what becomes of adapters."""
    ours("base-more sft-more --alpha 0.5 --drop 0", "ours-more")
    name = "model.layers.0.self_attn.q_norm.weight"
    retrained, before = weights("retrained"), weights(f"theirs-{len(SAME) - 1}")
    return {
        "unknown": {place: name in weights(folder) for place, folder in (("theirs", "unknown"), ("ours", "ours-more"))},
        "said": [line for line in said.splitlines() if "q_norm" in line],
        "length": {
            folder: json.loads(Path(folder, "tokenizer_config.json").read_text()).get("model_max_length")
            for folder in ("theirs-3", "ours-3", "base", "sft")
        },
        "cache": sum(path.stat().st_size for path in Path("cache").rglob("*.safetensors")),
        "model": Path("base/model.safetensors").stat().st_size,
        "retrained": sum(not before[key].equal(retrained[key]) for key in before),
    }


def same_table(found: dict[str, Any]) -> str:
    rows = []
    for case in found["same"]:
        share = 100 * case["differ"] / case["elements"]
        bits = f"{share:.2g} % differ, by {case['largest']:.1g} at most" if case["differ"] else "all equal"
        rows.append([case["what"], f"`{case['ours']}`", bits])
    return table([f"mergekit {found['mergekit']}", "here", "elements"], rows)


def dare_table(found: dict[str, Any]) -> str:
    """The masks and the scale of DARE."""
    dare, count = found["dare"], found["dare"]["tensors"]
    rows = [
        ["the same command again: tensors with another mask", f"{dare['again']} of {count}", f"0 of {count}"],
        ["the base in other shards: the same", f"{dare['shards']} of {count}", f"{dare['ours shards']} of {count}"],
        [
            "nothing dropped from the embedding: other tensors with another mask",
            f"{dare['theirs some']} of {count - 1}",
            f"{dare['ours some']} of {count - 1}",
        ],
    ]
    for what, name in (("default", "dare"), ("`rescale: false`, weight / density", "dare-eq6")):
        low, high = dare[name]["factor"]
        rows.append([f"scale of what is kept, relative to ours: {what}", f"{low:.7g} to {high:.8g}", "1"])
    return table([f"seen, with mergekit {found['mergekit']}", "mergekit", "here"], rows)


def rest_table(found: dict[str, Any]) -> str:
    """What becomes of other tensors, files and adapters."""
    rest = found["rest"]
    copied = {
        place: "sft" if rest["length"][place] == rest["length"]["sft"] else "base" for place in ("theirs-3", "ours-3")
    }
    unknown = {place: "merged" if there else "left out" for place, there in rest["unknown"].items()}
    rows = [
        ["a tensor in both models that the definition of Qwen2 lacks", unknown["theirs"], unknown["ours"]],
        ["a warning about that tensor", "yes" if rest["said"] else "no", ""],
        ["the result's `tokenizer_config.json` is that of", copied["theirs-3"], copied["ours-3"]],
        ["a merged copy of base and adapter, MB", f"{rest['cache'] / 1e6:.1f}", "none"],
        ["the adapter trained further, in its folder: is it merged?", "yes" if rest["retrained"] else "no", ""],
    ]
    return table([f"seen, with mergekit {found['mergekit']}", "mergekit", "here"], rows)


def main() -> None:
    """Run, or renew the page."""
    if "--run" in sys.argv:
        at = sys.argv.index("--peers-python") + 1 if "--peers-python" in sys.argv else 0
        run(sys.argv[at] if at else str(PEERS))
        return
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    parts = {"same": same_table(found), "dare": dare_table(found), "rest": rest_table(found)}
    update("from-mergekit.md", parts, __doc__)


if __name__ == "__main__":
    main()
