"""Match the tensors that an adapter changes to the names of the model it was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.model_files import leave_out_option
from ..common.messages import shown
from ..errors import MismatchError
from ..model.config import says_tied
from ..model.rename_rules import Shape, apply_rules, by_name
from ..model.tensor_names import (
    is_embedding_or_head,
    is_input_embedding,
    is_output_head,
    only_in,
    outer_bias,
    ready_option,
)
from .experts import Layout, single_layout
from .lora_config import read_settings
from .lora_parts import Parts, parameters_of, sort_parts, without_wrappers


def names_of(adapter: Checkpoint, model: Checkpoint) -> list[str]:
    """Return the names of the tensors an adapter changes, before any rule: the names of the model in memory."""
    assert adapter.adapter is not None
    adapter = replace(adapter, adapter=read_settings(adapter.adapter, adapter.label))
    return list(changed_tensors(sort_parts(adapter), adapter, model))


def changed_tensors(parts: Parts, adapter: Checkpoint, model: Checkpoint) -> dict[str, Shape]:
    """Return every tensor that an adapter changes, by the adapter's name, with its shape where that is certain."""
    assert adapter.adapter is not None
    wanted: dict[str, Shape] = dict.fromkeys((f"{module}.weight" for module in parts.rows), None)
    wanted |= {path: tensor.shape for path, tensor in parts.whole.items()}
    for (module, kind), pair in parts.factors.items():
        straight = {"A", "B"} <= set(pair) and kind == "weight" and not adapter.adapter["fan_in_fan_out"]
        shape = (*pair["B"].shape[:1], *pair["A"].shape[1:]) if straight else None
        wanted[f"{module}.{'bias' if kind == 'bias' else 'weight'}"] = shape
    layout = single_layout(model.tensors)
    for module in parts.experts:
        for parameter in parameters_of(module, adapter):
            wanted[name_in_model(module, parameter, layout)] = None
    return wanted


def match_to_model(
    parts: Parts, adapter: Checkpoint, model: Checkpoint, rules: Sequence[str], taken: Callable[[str], bool]
) -> dict[str, str]:
    """Return adapter name -> model name. Raises MismatchError for names that are not in the model, or ambiguous."""
    wanted = changed_tensors(parts, adapter, model)
    names = dict(zip(wanted, apply_rules(wanted, rules), strict=True))
    # A tied tensor has several names, and the model need not store them all; a head that it stores is matched as such.
    widths = {t.shape[1:] for n, t in model.tensors.items() if is_input_embedding(n) and says_tied(model.config)}
    unmatched = {n: path for path, n in names.items() if n not in model.tensors}
    tied = {
        n
        for n, path in unmatched.items()
        if is_embedding_or_head(n) and ((shape := wanted[path]) is None or shape[1:] in widths)
    }
    tied = tied if widths else set()
    for name, path in unmatched.items():  # and of its bias
        outer = model.tensors.get(outer_bias(name))
        if outer is not None and outer.shape == wanted[path] and is_output_head(f"{name.removesuffix('bias')}weight"):
            tied.add(name)
    stored = any(is_output_head(name) for name in model.tensors if name not in names.values())
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    # Differing vocabulary sizes are reported later, so shapes do not count here.
    sought = {
        n: None if is_embedding_or_head(n) else wanted[path]
        for n, path in unmatched.items()
        if stored or n not in tied or not is_output_head(n)
    }
    found = by_name(sought, shapes)
    unmatched = {n: path for n, path in unmatched.items() if n in found or n not in tied}
    names |= {unmatched[name]: new for name, new in found.items()}
    file_of = {without_wrappers(name): file for name, file in adapter.file_of.items()}
    beside = {file for part in adapter.parts if part.beside or part.folder for file in part.files}
    own = set(unmatched) - set(found)
    every = {*names, *model.tensors}
    for file in sorted(beside):
        names_of_file = {name for name in own if file_of.get(unmatched[name]) == file}
        surplus = {name for name in names_of_file if not taken(name)}
        complaint = only_in(surplus, model.tensors, f"{adapter.label} ({shown(file)})", model.label)
        if complaint:
            option = ready_option("--take", *sorted(surplus), every=every)
            cure = f"to let them through: {option}; or " if option else ""
            raise MismatchError(f"{complaint}; {cure}leave the file out: {leave_out_option(file)}")
        own -= names_of_file
    whole = {name for name in own if unmatched[name] in parts.whole}
    surplus = {name for name in own if name not in whole or not taken(name)}
    complaint = only_in(surplus, model.tensors, adapter.label, model.label)
    if complaint:
        option = ready_option("--take", *sorted(surplus), every=every) if surplus <= whole else ""
        cure = f"to let them through: {option}; " if option else ""
        raise MismatchError(
            f"{complaint}; {cure}is this the model that the adapter was trained on? If so, use --rename"
        )
    twice = next((new for new, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        both = " and ".join(f"'{shown(path)}'" for path, name in names.items() if name == twice)
        raise MismatchError(
            f"{both} of {adapter.label} would become '{shown(twice)}' of {model.label}; change --rename"
        )
    return names


def name_in_model(module: str, parameter: str, layout: Layout | None) -> str:
    """Return the tensor to look for in the model: the fused parameter, or its first part in expert 0."""
    ends = (layout or {}).get(parameter)
    return f"{module}.0.{ends[0]}" if ends else f"{module}.{parameter}"
