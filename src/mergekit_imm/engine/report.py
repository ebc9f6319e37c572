"""What a merge measured, as imm_report.json, and the model card beside it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.hub import split_ref
from ..checkpoint.open_checkpoint import is_hub_id
from ..model.tensor_names import layer_key
from ..options.recipe import CARD_FILE, LEAST_BARE_SIZE, RECIPE_FILE, REPORT_FILE, to_json
from ..plan.plan import Plan

_LISTS = ("keep", "take", "no_drop", "rename", "leave_out")  # parameters of several values
OUTSIDE = "outside the layers"
# Two parts of a path that is no hub id, though it has the form of one: `output/checkpoint-5`, `saves/qwen`.
_FOLDERS = re.compile(
    r"(outputs?|out|results?|runs?|saves?|saved(_models?)?|models?|check_?points?|ckpts?|logs?|exp(eriment)?s?|data|tmp|temp"
    r"|cache|local|home|root|mnt|opt|scratch|work(space|dir)?|artifacts?|weights|train(ing|ed|er)?|fine-?tuned?|merged?"
    r"|base|start|sft|adapters?|loras?|pretrained|rounds?|hf|llms?)([-_]?v?\d.*)?",
    re.IGNORECASE,
)
_STEPS = re.compile(
    r"(check_?point|ckpt|step|global_?step|iter(ation)?|epoch|round|version|run|v)[-_]?\d.*"
    r"|final|last|latest|best|merged|hf|huggingface|actor|model",
    re.IGNORECASE,
)


def statistics(plan: Plan, records: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Combine the records of all segments (one row each) into statistics per tensor and per layer.

    Sums of squares are added with math.fsum, so the order does not matter. A value that is not finite is None.
    """
    tensors: dict[str, Any] = {}
    layers: dict[str, list[npt.NDArray[np.float64]]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    at = 0
    for item in plan.items:
        rows = records[at : at + item.segment_count]
        at += item.segment_count
        entry: dict[str, Any] = {"action": item.action, "elements": item.source.count}
        if item.action == "merge":
            layer = layer_key(item.name) or OUTSIDE
            layers[layer].append(rows)
            counts[layer] += item.source.count
            entry |= _summary(rows, item.source.count)
        tensors[item.name] = entry
    return {
        "format": "mergekit_imm report",
        "version": 2,
        "layers": {
            layer: {"elements": counts[layer], **_summary(np.concatenate(rows), counts[layer])}
            for layer, rows in layers.items()
        },
        "tensors": tensors,
        # Only where it is so: a report that other versions wrote stays as it is.
        **({"sft_equals_start": True} if layers and not records[:, 0].any() else {}),
        # Of a hub id it depends on what else is in the cache; the report must not.
        "left_out": {
            role: list(each.left_out) for role, each in plan.inputs.items() if not each.repo and role != "start"
        },
    }


def _summary(rows: npt.NDArray[np.float64], elements: int) -> dict[str, Any]:
    delta, base, change = (math.fsum(column) if np.isfinite(column).all() else math.nan for column in rows[:, :3].T)
    return {
        "kept_share": float(rows[:, 4].sum()) / elements if elements else None,
        "delta_norm": _number(delta**0.5),
        "base_norm": _number(base**0.5),
        "change_norm": _number(change**0.5),
        "largest_change": _number(float(rows[:, 3].max(initial=0.0))),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def actions(plan: Plan) -> dict[str, int]:
    """Count the tensors by what happens to them."""
    words = {"merge": "merged", "keep": "kept", "take": "taken", "copy": "copied"}
    counts = dict.fromkeys(words.values(), 0)
    for item in plan.items:
        counts[words[item.action]] += 1
    return counts


def hub_ids(inputs: Mapping[str, Checkpoint]) -> list[str]:
    """Return the models on a hub that inputs are, or that folders say they were made from.

    The latter by `_name_or_path` of a config, `base_model_name_or_path` of an adapter: only what cannot be a folder, as
    a path that reads as a hub id would credit somebody else.
    """
    found = []
    for each in inputs.values():
        named = (each.config or {}).get("_name_or_path") if each.adapter is None else each.trained_on
        if each.repo:
            found.append(each.repo)
        elif isinstance(named, str) and split_ref(named) == (named, None) and is_hub_id(named):
            owner, name = named.split("/")
            if not _FOLDERS.fullmatch(owner) and not _STEPS.fullmatch(name):
                found.append(named)
    return list(dict.fromkeys(found))


def model_card(plan: Plan, recipe: Mapping[str, Any]) -> bytes:
    """Return the README.md of a merged model: tags, the recipe as a table, how to reproduce it."""
    p = plan.parameters
    inputs = {role: each.ref + (f" @ {each.commit}" if each.commit else "") for role, each in plan.inputs.items()}
    models = hub_ids(plan.inputs)
    rows = [
        *((f"`{role}`", _cell(ref)) for role, ref in inputs.items()),
        ("`alpha` (weight of the base)", f"{p.alpha}"),
        ("`drop`", f"{p.drop}"),
        ("`seed`", f"{p.seed}"),
        ("`iteration`", f"{p.iteration}"),
        ("`reference`", p.reference),
        ("layer importance", "given; see the recipe" if p.importance is not None else "none"),
        *((f"`{o}`", _cell(str(getattr(p, o)))) for o in ("shrink", "clip") if getattr(p, o) not in (1.0, None)),
        *((("`layer_factors`", _cell(_factors_text(p.layer_factors))),) if p.layer_factors is not None else ()),
        *((("`sparsify`", _cell(p.sparsify)),) if p.sparsify != "dare" else ()),
        ("dtype", "as in the base" if p.dtype == "base" else p.dtype),
        *((f"`{o}`", _cell(" ".join(getattr(p, o)))) for o in _LISTS if getattr(p, o)),
        *((("`vocab`", f"the {p.vocab}'s"),) if p.vocab != "strict" else ()),
    ]
    command = ["imm-merge", *(f"{plan.inputs[role].ref}" for role in ("base", "sft"))]
    command += ["--start", plan.inputs["start"].ref] if "start" in plan.inputs else []
    command += [
        "--alpha",
        str(p.alpha),
        "--drop",
        str(p.drop),
        "--seed",
        str(p.seed),
        "--iteration",
        str(p.iteration),
    ]
    command += ["--importance", "importance.json"] if p.importance is not None else []
    command += ["--shrink", str(p.shrink)] if p.shrink != 1 else []
    command += ["--clip", *map(str, p.clip)] if p.clip is not None else []
    if p.layer_factors is not None:
        command += ["--layer-factors", p.layer_factors if isinstance(p.layer_factors, str) else "factors.json"]
    command += ["--sparsify", p.sparsify] if p.sparsify != "dare" else []
    command += ["--reference", p.reference] if p.reference != "start" else []
    command += ["--dtype", p.dtype] if p.dtype != "base" else []
    if p.max_shard_size:  # a smaller number without a unit is refused
        command += ["--max-shard-size", f"{p.max_shard_size}{'B' if p.max_shard_size < LEAST_BARE_SIZE else ''}"]
    command += ["--vocab", p.vocab] if p.vocab != "strict" else []
    for option in _LISTS:
        for pattern in getattr(p, option):
            command += [f"--{option.replace('_', '-')}", pattern]
    command += [f"--{o.replace('_', '-')}" for o in ("allow_nonfinite", "copy_code", "dequantize") if getattr(p, o)]

    lines = [
        "---",
        *(
            ("base_model:", *(f"- {json.dumps(model)}" for model in models), "base_model_relation: merge")
            if models
            else ()
        ),
        "library_name: transformers",
        "tags:",
        "- merge",
        "- mergekit_imm",
        "- imm",
        "---",
        "",
        "# A merged model",
        "",
        "A fine-tuned model pulled back towards its base (iterative model merging,",
        "[arXiv 2503.02103](https://arxiv.org/abs/2503.02103)):",
        "",
        f"    merged = alpha * base + (1 - alpha) * (start + factor * {p.sparsify.upper()}(sft - start))",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"Round {p.iteration}; {len(recipe['history'])} earlier rounds are in `{RECIPE_FILE}`.",
        f"What changed, per tensor and layer, is in `{REPORT_FILE}`.",
        "",
        "The same bytes again:",
        "",
        f"    {shlex.join([*command, '-o', 'OUT'])}",
        "",
        "Check these against the inputs:",
        "",
        "    imm-verify OUT",
        "",
    ]
    return "\n".join(lines).encode()


def written_files(plan: Plan, recipe: Mapping[str, Any], records: npt.NDArray[np.float64]) -> dict[str, bytes]:
    """Return the small files that a merge writes itself, the recipe last."""
    files: dict[str, bytes] = {**plan.indexes, **plan.configs}
    files[REPORT_FILE] = to_json(statistics(plan, records))
    files[CARD_FILE] = model_card(plan, recipe)
    files[RECIPE_FILE] = to_json(recipe)
    return files


def _factors_text(factors: Mapping[str, float] | str) -> str:
    return factors if isinstance(factors, str) else "given; see the recipe"


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"
