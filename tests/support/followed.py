"""Follow the advice of a refusal until the merge succeeds or nothing is offered, and check the result."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from checkpoints import State
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.common.messages import for_caller
from mergekit_imm.errors import MergeError
from mergekit_imm.plan.describe import check

transformers.utils.logging.disable_progress_bar()

Options = tuple[tuple[str, ...], ...]
_VALUES = re.compile(r"--(vocab (?:base|sft)|reference base|dtype \w+|dequantize|allow-nonfinite)\b")
_PATTERN = re.compile(r"--(?:(keep|take|no-drop|rename) (?=['\"^])|(leave-out) (?![A-Z]+\b))")
_LEFT_OUT = re.compile(r"leave out (--[a-z-]+)")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers")


@dataclass(frozen=True)
class Ending:
    """Where the advice led: to a merge, or to a message without an option."""

    options: Options
    out: Path | None
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """Inputs of a merge, and the class that loads its result."""

    base: Path
    sft: Path
    auto: Any
    start: Path | None = None

    @property
    def arguments(self) -> list[str]:
        more = [] if self.start is None else ["--start", str(self.start), "--iteration", "1"]
        return [str(self.base), str(self.sft), "--drop", "0", "--workers", "1", "-q", *more]


def offered(message: str) -> list[Options]:
    """Parse the options that a message offers, one set for each alternative."""
    found: list[Options] = [(tuple(f"--{match[1]}".split(" ")),) for match in _VALUES.finditer(message)]
    found = [each for each in found if not re.search(f"leave out {each[0][0]}", message)]
    for match in _PATTERN.finditer(message):
        lexer = shlex.shlex(message[match.end() :], posix=True)
        lexer.whitespace_split = True
        lexer.commenters = ""
        found.append(((f"--{match[1] or match[2]}", next(lexer).rstrip(";,")),))
    return found


def endings(inputs: Inputs, folder: Path, options: Options = (), messages: tuple[str, ...] = ()) -> Iterator[Ending]:
    """Merge; if refused, retry with each option that the message offers, recursively."""
    assert len(messages) < 12, f"advice without end: {messages}"
    out = folder / f"out{len(list(folder.glob('out*')))}"
    arguments = [*inputs.arguments, *(word for option in options for word in option)]
    try:
        merge_command.main([*arguments, "-o", str(out)], standalone_mode=False)
    except MergeError as error:
        message = str(error.args[0])
        assert message not in messages, f"following the advice changes nothing: {message}"
    else:
        yield Ending(options, out, messages)
        return
    assert not out.exists()
    gone = {match[1] for match in _LEFT_OUT.finditer(message)}
    rest = tuple(option for option in options if option[0] not in gone)
    alternatives = offered(message) or ([()] if gone else [])
    if not alternatives:
        yield Ending(options, None, (*messages, message))
    for each in alternatives:
        yield from endings(inputs, folder, (*rest, *each), (*messages, message))


def looks_right(inputs: Inputs, ending: Ending) -> None:
    """Check a merged folder: it loads, config and tensors are right, and every option was needed."""
    out = ending.out
    assert out is not None
    model, info = _load(inputs.auto, out)
    base_model, base_info = _load(inputs.auto, inputs.base)
    sft_state, sft_unexpected = _state_of_sft(inputs)
    assert info["missing_keys"] <= base_info["missing_keys"], info
    assert info["unexpected_keys"] <= base_info["unexpected_keys"] | sft_unexpected, info
    assert not info["mismatched_keys"]

    files = {"base": _tensors(inputs.base), "sft": _tensors(inputs.sft), "out": _tensors(out)}
    keep, take = ([re.compile(o[1]) for o in ending.options if o[0] == option] for option in ("--keep", "--take"))
    kept = {n for n in files["out"] if any(p.search(n) for p in keep)}
    taken = {n for n in files["out"] if any(p.search(n) for p in take)}
    for names, role in ((kept, "base"), (taken, "sft")):
        total = sum(tensor.numel() for tensor in files[role].values())
        assert sum(files[role][n].numel() for n in names if n in files[role]) <= 0.5 * total, "most of the model"
    _check_layers(inputs.base, out, files)
    if _ties(model):
        _check_ties(inputs, ending.options, out)
    _check_experts(files["out"], kept, taken)

    loaded = {"base": base_model.state_dict(), "sft": sft_state}
    vocab = next((option[1] for option in ending.options if option[0] == "--vocab"), "base")
    assert set(files["base"]) <= set(files["out"])
    for name, tensor in files["out"].items():
        base, sft = (files[role].get(name, loaded[role].get(name)) for role in ("base", "sft"))
        expected = base if name in kept else sft if name in taken else _average(base, sft, vocab)
        assert expected is not None, f"{name} is in one model only, and neither kept nor taken"
        expected = expected.to(tensor.dtype)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)


def told_in_advance(inputs: Inputs, first: str) -> list[str]:
    """Return the problems that `--check` lists; they include the first refusal if headers show it."""
    problems = check(inputs.base, inputs.sft, start=inputs.start).problems
    if "NaN" not in first and "differs at element" not in first:
        assert for_caller(first) in problems
    return problems


def _load(auto: Any, folder: Path) -> tuple[Any, dict[str, set[str]]]:
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    return model, {key: {each[0] if isinstance(each, tuple) else each for each in info[key]} for key in info}


def _state_of_sft(inputs: Inputs) -> tuple[State, set[str]]:
    """Return which sft tensors transformers reads and which it ignores; nothing if it cannot load the sft."""
    try:
        model, info = _load(inputs.auto, inputs.sft)
    except RuntimeError:
        return {}, set()
    return model.state_dict(), info["unexpected_keys"]


def _tensors(folder: Path) -> State:
    """Read a model's tensors; names in sub-folders include the folder."""
    found: State = {}
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]):
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        place = path.parent.relative_to(folder).as_posix()
        found |= {name if place == "." else f"{place}/{name}": tensor for name, tensor in state.items()}
    return found


def _average(base: torch.Tensor | None, sft: torch.Tensor | None, vocab: str) -> torch.Tensor | None:
    if base is None or sft is None:
        return None
    if not base.is_floating_point():
        assert torch.equal(base, sft)
        return base
    rows = min(len(base), len(sft)) if base.dim() else None
    common = base[:rows].float() if rows is not None else base.float()
    merged = (common + (sft[:rows] if rows is not None else sft).float()) / 2
    if rows is None or base.shape == sft.shape:
        return merged
    return torch.cat([merged, {"base": base, "sft": sft}[vocab][rows:].float()])


def _check_layers(base: Path, out: Path, files: Mapping[str, State]) -> None:
    """Check that the files hold as many layers as the config says, plus any extra layers of the base."""

    def beyond(folder: Path, names: Mapping[str, Any]) -> int:
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config", config)
        count: int = next(config[key] for key in _LAYERS if key in config)
        layers = [re.search(r"(?:^|\.)(?:layers?|h|block)\.(\d+)\.", n) for n in names if "visual" not in n]
        return 1 + max(int(match[1]) for match in layers if match) - count

    assert beyond(out, files["out"]) in (0, beyond(base, files["base"]))


def _ties(model: Any) -> bool:
    return model.get_output_embeddings() is not None and model.config.get_text_config().tie_word_embeddings


def _check_ties(inputs: Inputs, options: Options, out: Path) -> None:
    """Merge again with dropping, where different masks would break a tie declared by the config."""
    dropped = out.with_name(f"{out.name}-dropped")
    arguments = [*inputs.arguments, "--drop", "0.5", *(word for option in options for word in option)]
    merge_command.main([*arguments, "-o", str(dropped)], standalone_mode=False)
    model, _ = _load(inputs.auto, dropped)
    assert _ties(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    torch.testing.assert_close(head, embedding, rtol=0, atol=0, equal_nan=True, msg="a broken tie")


def _check_experts(out: State, *groups: set[str]) -> None:
    for names in groups:
        for name in names:
            found = re.match(r".*\bexperts\.(\d+\.)?", name)
            assert found is None or {n for n in out if n.startswith(found[0])} <= names, "half of a pair of experts"


def rewrite(folder: Path, change: Callable[[State], State]) -> None:
    """Rewrite a model folder with changed tensors."""
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    state = {name: tensor.clone().contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(state, path, metadata={"format": "pt"})
