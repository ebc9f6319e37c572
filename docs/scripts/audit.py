"""What `imm-verify` says of merges that mergekit and PEFT made: right ones of several architectures, and wrong ones.

    python docs/scripts/audit.py [--check]     renews the tables of docs/audit.md from audit.json
    python docs/scripts/audit.py --run         makes the merges and audits them: some minutes on one core

mergekit runs in an environment of its own (`make .venv-peers/ready`, or its Python with --peers-python). Of each
architecture a small random model is made, a full fine-tuning of it, and an adapter. mergekit's `linear`, in the dtype
of the models, and `task_arithmetic` with the adapter's merge, and PEFT's own merge are audited as what they are: an
alarm would be false. Then each is audited as what it is not.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from pages import DOCS, update

from results import table

RESULTS = Path(__file__).resolve().parent / "audit.json"
PEERS = DOCS.parent / ".venv-peers" / "bin" / "python"
NAMES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss")
DTYPES = ("bfloat16", "float16", "float32")
WEIGHTS = (0.3, 0.7)
# What is made, and as what it is audited: the tool's method, and the options of the audit.
RIGHT: dict[str, dict[str, Any]] = {
    "mergekit linear": {"weights": WEIGHTS},
    "mergekit linear, not normalised": {"weights": (0.6, 0.7)},
    "mergekit task_arithmetic": {"alpha": 0.3},
    "mergekit slerp, t = 1": {"method": "lora"},
    "PEFT": {},
}


# Runs in mergekit's environment: merges one after the other, and prints why one failed, or nothing.
MERGER = """
import json, logging, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
logging.disable(logging.CRITICAL)
failed = {}
for out, content in json.load(open(sys.argv[1])).items():
    try:
        run_merge(MergeConfiguration.model_validate(content), out, MergeOptions(copy_tokenizer=False, quiet=True))
    except BaseException as error:
        failed[out] = f"{type(error).__name__}: {error}"[:200]
json.dump(failed, open(sys.argv[2], "w"))
"""


def config_of(folder: Path, what: str, dtype: str) -> dict[str, Any]:
    """What mergekit is told."""
    base, sft = ({"model": str(folder / role)} for role in ("base", "sft"))
    method = what.split()[1].rstrip(",")
    content: dict[str, Any] = {"merge_method": method, "dtype": dtype}
    if method == "linear":
        weights = RIGHT[what]["weights"]
        models = [{**each, "parameters": {"weight": w}} for each, w in zip((base, sft), weights, strict=True)]
        return {**content, "models": models, "parameters": {"normalize": "not" not in what}}
    if method == "task_arithmetic":
        models = [{**sft, "parameters": {"weight": WEIGHTS[1]}}]
        return {**content, "base_model": base["model"], "models": models}
    return {**content, "base_model": base["model"], "models": [base, sft], "parameters": {"t": 1.0}}


def run(python: Path) -> None:
    """Make all merges, audit them and write what was said."""
    sys.path[:0] = [str(DOCS.parent / "tests"), str(DOCS.parent / "tests" / "support")]
    import peft
    import torch

    from mergekit_imm import audit
    from merges import peft_merge_of, write_small

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="audit-") as temporary:
        root = Path(temporary)
        merges = [(root / f"{n}-{d}", n, d, what) for n in NAMES for d in DTYPES for what in RIGHT]
        for folder, name, dtype in dict.fromkeys(each[:3] for each in merges):
            with contextlib.redirect_stdout(io.StringIO()):
                write_small(folder, name, getattr(torch, dtype))
                peft_merge_of(name, folder / "base", folder / "adapter", folder / "PEFT", dtype)
        todo = {str(f / what): config_of(f, what, d) for f, _, d, what in merges if what != "PEFT"}
        (root / "todo.json").write_text(json.dumps(todo))
        subprocess.run(
            [python, "-c", MERGER, root / "todo.json", root / "failed.json"], check=True, capture_output=True
        )
        failed = json.loads((root / "failed.json").read_text())
        for folder, name, dtype, what in merges:
            entry: dict[str, Any] = {"architecture": name, "dtype": dtype, "what": what}
            if str(folder / what) in failed:
                entry["failed"] = failed[str(folder / what)].replace(str(folder), "…")
            else:
                sft = folder / ("adapter" if what == "PEFT" else "sft")
                verdict = audit(folder / what, folder / "base", sft, **RIGHT[what]).verdict
                entry |= {"kind": verdict.kind, "line": verdict.line}
                of_base = audit(folder / "base", folder / "base", sft, **RIGHT[what])
                entry["of base"] = of_base.verdict.kind
                entry["as alpha 0.8"] = audit(folder / what, folder / "base", sft, alpha=0.8).verdict.kind
            found.append(entry)
            print(entry, flush=True)
    version = "from importlib.metadata import version; print(version('mergekit'))"
    ran = subprocess.run([python, "-c", version], capture_output=True, text=True, check=True)
    versions = {"mergekit": ran.stdout.strip(), "PEFT": peft.__version__, "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"versions": versions, "merges": found}, indent=1) + "\n", encoding="utf-8")


def tables() -> str:
    """How many merges of each kind were recognised."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = []
    for what in RIGHT:
        some = [each for each in content["merges"] if each["what"] == what]
        made_ = [each for each in some if "failed" not in each]
        right = sum(each["kind"] == "as claimed" for each in made_)
        unmerged = sum(each["of base"] == "not merged" for each in made_)
        others = Counter(each["as alpha 0.8"] for each in made_)
        rows.append([what, str(len(made_)), str(right), str(unmerged), str(len(made_) - others["as claimed"])])
    head = ["made by", "merges", "as claimed", "the base in its place: not merged", "as alpha 0.8: not as claimed"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    names = ", ".join(f"`{name}`" for name in NAMES)
    failed = [each for each in content["merges"] if "failed" in each]
    not_made = Counter((each["what"], each["architecture"]) for each in failed)
    rest = "; ".join(f"{what} of {name} ({count})" for (what, name), count in sorted(not_made.items()))
    lacking = f" Not made, as the tool refused: {rest}." if rest else ""
    return f"{table(head, rows)}\n\n{versions}; {names}, each in {', '.join(DTYPES)}.{lacking}"


def main() -> None:
    """Rewrite the page, or check it."""
    update("audit.md", {"audit": tables()}, __doc__)


if __name__ == "__main__":
    if "--run" in sys.argv:
        given = sys.argv[sys.argv.index("--peers-python") + 1] if "--peers-python" in sys.argv else PEERS
        run(Path(given))
    else:
        main()
