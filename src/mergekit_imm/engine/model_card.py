"""The README.md of a merged model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.hub import split_ref
from ..checkpoint.open_checkpoint import is_hub_id
from ..options.options import MERGE_DEFAULTS, as_arguments
from ..options.recipe import RECIPE_FILE, REPORT_FILE
from ..plan.plan import Plan

# Options with a row in the card if set.
_VALUES = ("shrink", "clip", "layer_factors", "sparsify")
# Names in local paths that look like hub ids: `output/checkpoint-5`, `saves/qwen`.
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


def hub_ids(inputs: Mapping[str, Checkpoint]) -> list[str]:
    """Return the hub models that the inputs are, or that local inputs were made from.

    The latter from `_name_or_path` of a config or `base_model_name_or_path` of an adapter. Anything that may be a local
    path is left out: read as a hub id, it would credit somebody else.
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
    """Return the README.md of a merged model: tags, the recipe as a table, how to reproduce the merge."""
    o = plan.options
    inputs = {role: each.ref + (f" @ {each.commit}" if each.commit else "") for role, each in plan.models.items()}
    models = hub_ids(plan.models)
    lists = [name for name in MERGE_DEFAULTS if isinstance(getattr(o, name), tuple) and name != "clip"]
    rows = [
        *((f"`{role}`", _cell(ref)) for role, ref in inputs.items()),
        ("`alpha` (weight of the base)", f"{o.alpha}"),
        ("`drop`", f"{o.drop}"),
        ("`seed`", f"{o.seed}"),
        ("`iteration`", f"{o.round}"),
        ("`reference`", o.reference),
        ("layer importance", "given; see the recipe" if o.importance is not None else "none"),
        *(
            (f"`{name}`", _cell(_text(getattr(o, name))))
            for name in _VALUES
            if getattr(o, name) != MERGE_DEFAULTS[name]
        ),
        ("dtype", "as in the base" if o.dtype == "base" else o.dtype),
        *((f"`{name}`", _cell(" ".join(getattr(o, name)))) for name in lists if getattr(o, name)),
        *((("`vocab`", f"the {o.vocab}'s"),) if o.vocab != "strict" else ()),
        *((("result", "an adapter of the base: the factors of `sft`, scaled"),) if o.as_adapter else ()),
    ]
    relation = "adapter" if o.as_adapter else "merge"
    refs = {role: each.ref for role, each in plan.models.items()}
    start = ["--start", refs["start"]] if "start" in refs else []
    command = ["imm-merge", refs["base"], refs["sft"], *start, *as_arguments(o)]

    lines = [
        "---",
        *(
            ("base_model:", *(f"- {json.dumps(model)}" for model in models), f"base_model_relation: {relation}")
            if models
            else ()
        ),
        f"library_name: {'peft' if o.as_adapter else 'transformers'}",
        "tags:",
        "- merge",
        "- mergekit_imm",
        "- imm",
        "---",
        "",
        "# A merged adapter" if o.as_adapter else "# A merged model",
        "",
        "A fine-tuned model pulled back towards its base (iterative model merging,",
        "[arXiv 2503.02103](https://arxiv.org/abs/2503.02103)):",
        "",
        f"    merged = alpha * base + (1 - alpha) * (start + factor * {o.sparsify.upper()}(sft - start))",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"Round {o.round}; {len(recipe['history'])} earlier rounds are in `{RECIPE_FILE}`.",
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


def _text(value: Any) -> str:
    return "given; see the recipe" if isinstance(value, Mapping) else str(value)


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"
