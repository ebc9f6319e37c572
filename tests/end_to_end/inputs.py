"""The inputs of a situation on disk, made by transformers and PEFT, and the models that they are, in memory."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor

from .situations import Adapter, Round, Situation, Stored
from .zoo import ARCHITECTURES, auto_of, ends_of, is_tied, moved, new_model, norm_leaf, say_tied, shared_names, untie

State = dict[str, Tensor]
PARTS = {  # what lies beside a model: file, names in it, shapes
    "value head": ("value_head.safetensors", {"v_head.summary.weight": (1, 16), "v_head.summary.bias": (1,)}),
    "dense": ("2_Dense/model.safetensors", {"linear.weight": (8, 16), "linear.bias": (8,)}),
}
SHARD = 6000  # bytes


class NotBuiltError(Exception):
    """PEFT or transformers do not make such an input."""


@dataclass(frozen=True)
class Input:
    """A model on disk, and what it is."""

    folder: Path
    model: Any  # in memory, float32, with the values that are stored
    parts: State  # what lies beside it, by path and name: `2_Dense/linear.weight`


def state_of(model: Any) -> State:
    """Return every tensor of a model that was loaded, in float32, by the names of the files that it came from.

    A tied tensor is there under each of its names.
    """
    return _saved(model, original=True)


def _saved(model: Any, *, original: bool) -> State:
    alone = untie(copy.deepcopy(model).float())
    with tempfile.TemporaryDirectory() as folder:
        alone.save_pretrained(folder, save_original_format=original)
        found: State = load_file(Path(folder) / "model.safetensors")
    return found


def loaded(architecture: str, folder: Path) -> Any:
    """Return a model of a folder, in float32."""
    return auto_of(architecture).from_pretrained(folder, dtype=torch.float32).eval()


def _check_equal_ends(situation: Situation, ends: str) -> None:
    if ends == "equal" and "t5" in situation.architecture:
        raise NotBuiltError("transformers ties what is equal in a T5, whatever its config says")


def write_base(situation: Situation, folder: Path) -> Input:
    """Write the base."""
    _check_equal_ends(situation, situation.ends)
    tied = situation.ends in ("tied", "apart")
    model = new_model(situation.architecture, tied=tied)
    model = _with_ends(model, {"tied": "start"}.get(situation.ends, situation.ends), seed=4)
    written = _write(model, situation.base, folder, says_tied=tied)
    parts = _write_part(situation.beside, folder, seed=5)
    if situation.tokenizer:
        tokenizer_of(90).save_pretrained(folder)
    found = loaded(situation.architecture, folder)
    if not _equal(found.state_dict(), written.state_dict()):
        raise NotBuiltError("transformers reads something else than it wrote")
    return Input(folder, found, parts)


def write_sft(situation: Situation, number: int, start: Input, folder: Path) -> Input:
    """Write the SFT of a round, full or an adapter."""
    one = situation.rounds[number]
    _check_equal_ends(situation, one.ends)
    if one.ends == "equal" and "bart" in situation.architecture:
        raise NotBuiltError("transformers does not tie a BART of tensors in memory, whatever its config says")
    seed = 100 * situation.seed + number
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = copy.deepcopy(start.model)
        rows = model.get_input_embeddings().weight.shape[0] + one.rows
        if one.rows:
            before = shared_names(model)
            model.resize_token_embeddings(rows, mean_resizing=False)
            if shared_names(model) != before:
                raise NotBuiltError("transformers ties embeddings again that it resizes")
        if one.adapter is None:
            model = moved(_with_ends(model, one.ends, seed=seed + 7, before=True), seed=seed)
            if one.ends == "equal":
                _equal_ends(model)
            tied = one.ends == "apart" or model.config.get_text_config().tie_word_embeddings
            model = _write(model, one.sft, folder, says_tied=tied)
            if one.rows and not one.sft.prefix:
                _check_loads(situation, folder)
        else:
            model = _write_adapter(situation, one, model, folder, seed)
    parts = dict(start.parts)
    if one.part in PARTS:
        parts |= _write_part(one.part, folder, seed=seed + 9)
    elif situation.beside and (one.adapter is None or seed % 2):
        parts |= _write_part(situation.beside, folder, seed=seed + 9)
    if one.part in ("safetensors", "bin"):
        model = _beside(model, one, folder, seed)
    if situation.tokenizer and (one.adapter is None or one.rows):
        tokenizer_of(90, max(0, rows - 90) if one.rows else 0).save_pretrained(folder)
    return Input(folder, model, parts)


def _check_loads(situation: Situation, folder: Path) -> None:
    """Heads with two biases that are not tied are resized by halves."""
    try:
        loaded(situation.architecture, folder)
    except RuntimeError as error:
        raise NotBuiltError("transformers does not read what it resized") from error


def tokenizer_of(words: int, more: int = 0) -> Any:
    """Return a tokenizer of some words, and of more that were added."""
    table = {"<unk>": 0, **{f"w{number}": number for number in range(1, words)}}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="<unk>")), unk_token="<unk>"
    )
    fast.add_tokens([AddedToken(f"<more{number}>") for number in range(more)])
    return fast


def _with_ends(model: Any, ends: str, *, seed: int, before: bool = False) -> Any:
    """Tie or untie a model's ends, in place. What is only moved later (`before`) may still be equal."""
    if ends in ("untied", "apart"):
        untie(model)
        if not before:
            with torch.no_grad():
                head = model.get_output_embeddings().weight
                head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) * 0.02)
    elif ends == "equal":
        untie(model)
        _equal_ends(model)
    elif ends == "tied" and not is_tied(model):
        say_tied(model.config, True)
        model.tie_weights()
    return model


@torch.no_grad()
def _equal_ends(model: Any) -> None:
    model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def _write(model: Any, how: Stored, folder: Path, *, says_tied: bool) -> Any:
    """Write a model, and return it as it was stored, in float32."""
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stored = copy.deepcopy(model).to(getattr(torch, how.dtype))
    if how.float_norms:
        for name, parameter in stored.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter.data = exact[name]
    shard = SHARD if how.form.endswith("sharded") else 10**9
    stored.save_pretrained(folder, max_shard_size=shard, save_original_format=how.original)
    if how.form.startswith("bin") or how.every_name or how.prefix:
        _rewrite(stored, how, folder)
    config = json.loads((folder / "config.json").read_text())
    for level in (config, config.get("text_config", {})):
        if "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = says_tied
    if says_tied and not model.config.get_text_config().tie_word_embeddings:
        config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return stored.float()


def _rewrite(model: Any, how: Stored, folder: Path) -> None:
    """Store a model's tensors by other names, or by torch.save."""
    files = sorted(folder.glob("*.safetensors"))
    state: State = {}
    for file in files:
        state |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if how.every_name:
        for name, tensor in _saved(model, original=how.original).items():
            if name not in state:
                twin = next(other for other in state.values() if torch.equal(other.float(), tensor))
                state[name] = twin if how.form.startswith("bin") else twin.clone()
    state = {how.prefix + name: tensor for name, tensor in state.items()}
    shards: list[list[str]] = [[]]
    for name in sorted(state):
        size = sum(state[other].nbytes for other in shards[-1])
        if how.form.endswith("sharded") and shards[-1] and size + state[name].nbytes > SHARD:
            shards.append([])
        shards[-1].append(name)
    stem, end = ("pytorch_model", "bin") if how.form.startswith("bin") else ("model", "safetensors")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        shard = f"{stem}-{number:05}-of-{len(shards):05}.{end}" if len(shards) > 1 else f"{stem}.{end}"
        tensors = {name: state[name] for name in names}
        if end == "bin":
            torch.save(tensors, folder / shard)
        else:
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def _write_part(kind: str, folder: Path, *, seed: int) -> State:
    """Write what lies beside a model."""
    if not kind:
        return {}
    file, shapes = PARTS[kind]
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    if kind == "dense":
        (folder / "2_Dense" / "config.json").write_text('{"in_features": 16, "out_features": 8, "bias": true}')
    prefix = f"{Path(file).parent}/" if "/" in file else ""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _write_adapter(situation: Situation, one: Round, model: Any, folder: Path, seed: int) -> Any:
    """Train an adapter on a model, write it, and return what PEFT merges."""
    assert one.adapter is not None
    wanted = one.adapter
    embedding, head = ends_of(model)
    names, rows = model.state_dict().keys(), model.get_input_embeddings().weight.shape[0]
    try:
        config = _lora_config(situation, wanted, embedding, head, norm_leaf(model))
        wrapped = peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise NotBuiltError(f"peft: {type(error).__name__}: {error}") from error
    dtype = getattr(torch, wanted.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
                parameter.copy_(parameter.to(dtype))
    try:
        wrapped.save_pretrained(folder)
        merged = wrapped.merge_and_unload().eval()
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, KeyError) as error:
        raise NotBuiltError(f"peft: {type(error).__name__}: {error}") from error
    if merged.state_dict().keys() != names:
        raise NotBuiltError("peft: its merge leaves modules of its own")
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    if one.rows and not any(tensor.shape[0] == rows and "lora_" not in name for name, tensor in state.items()):
        raise NotBuiltError("peft: it does not store an embedding that was resized")
    if all(torch.equal(tensor.to(dtype).float(), tensor.float()) for tensor in state.values()):
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if wanted.form == "bin":
        torch.save(state, folder / "adapter_model.bin")
        file.unlink()
    else:
        save_file(state, file, metadata={"format": "pt"})
    return merged


def _lora_config(situation: Situation, wanted: Adapter, embedding: str, head: str, norm: str | None) -> Any:
    modules = {"embedding": embedding, "head": head, "norm": norm}
    targets = [*wanted.targets, *([embedding] if wanted.embedding else []), *([head] if wanted.head else [])]
    options: dict[str, Any] = {}
    if wanted.experts == "modules":
        targets += [leaf for leaf in ARCHITECTURES[situation.architecture].expert_leaves if leaf not in targets]
    if wanted.experts == "parameters":
        options["target_parameters"] = list(ARCHITECTURES[situation.architecture].experts)
    if wanted.patterns and targets:
        options |= {"rank_pattern": {targets[0]: 3}, "alpha_pattern": {targets[0]: 5}}
    if wanted.tokens:
        rows = list(wanted.tokens)
        kinds = {"both": ("embedding", "head")}.get(wanted.tokens_of, (wanted.tokens_of,))
        options["trainable_token_indices"] = {str(modules[kind]).rpartition(".")[2]: rows for kind in kinds}
    return peft.LoraConfig(
        task_type=ARCHITECTURES[situation.architecture].task,
        r=wanted.r,
        lora_alpha=wanted.lora_alpha,
        target_modules=targets,
        modules_to_save=[modules[kind] for kind in wanted.saved if modules[kind]] or None,
        use_rslora=wanted.rslora,
        use_dora=wanted.dora,
        bias=wanted.bias,
        lora_bias=wanted.lora_bias,
        ensure_weight_tying=wanted.ensure_weight_tying,
        **options,
    )


def _beside(model: Any, one: Round, folder: Path, seed: int) -> Any:
    """Move a trained tensor of an SFT into a file beside it, as trainers do with what they train without factors."""
    name, parameter = [(n, p) for n, p in model.named_parameters() if "norm" in n.lower() or "ln_" in n][-1]
    with torch.no_grad():
        if one.adapter is not None:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    tensor = parameter.detach().clone()
    if one.adapter is None:
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        held = [file for file in files if _take_out(file, name, one)]
        if not held:
            raise NotBuiltError("the tensor has another name in the files")
    names = {"": name, "bin": f"base_model.model.{name}"}
    if one.part == "bin":
        torch.save({names["bin"] if one.adapter else name: tensor}, folder / "non_lora_state_dict.bin")
    else:
        save_file({name: tensor}, folder / "vit.safetensors", metadata={"format": "pt"})
    return model


def _take_out(file: Path, name: str, one: Round) -> bool:
    name = one.sft.prefix + name
    is_bin = file.suffix == ".bin"
    state = torch.load(file) if is_bin else load_file(file)
    if name not in state or len(state) == 1:
        return False
    del state[name]
    if is_bin:
        torch.save(state, file)
    else:
        save_file(state, file, metadata={"format": "pt"})
    for index in file.parent.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"].pop(name, None)
        index.write_text(json.dumps(content))
    return True


def copied(source: Path, target: Path) -> Path:
    """Copy a folder."""
    return Path(shutil.copytree(source, target))
