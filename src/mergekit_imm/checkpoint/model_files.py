"""What each file of a model is, by its path: weights, and how they group; a file that is copied; or neither.

sentence-transformers keeps modules in sub-folders (`2_Dense/`), diffusers the components of a pipeline, and trainers
write extra weights beside a model or an adapter (`value_head.safetensors`). All of these are the model. Copies of the
weights in other formats, training state and files that match `--leave-out` are not.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from ..common.checks import MODEL_PLACE
from ..common.messages import shown
from ..errors import CheckpointError
from ..options.recipe import CARD_FILE, RECIPE_FILE, REPORT_FILE, STATEMENT_FILE
from .dcp import FSDP_FOLDER, METADATA
from .other_formats import adapter_file, no_model, other_form
from .safetensors_file import ADAPTER, ADAPTER_CONFIG, INDEX, MODEL, is_plain_name
from .torch_file import ADAPTER_BIN, BIN, BIN_INDEX, FSDP_BIN

OWN = (CARD_FILE, RECIPE_FILE, REPORT_FILE)  # what every merge writes itself
READ = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # suffixes of weight files
SPLIT = ("modules.json", "model_index.json")  # either marks a model of several parts

MAIN = ("model", "diffusion_pytorch_model")  # stems of the files that loaders open in a folder
_MAIN_BIN = {"pytorch_model": "model", "diffusion_pytorch_model": "diffusion_pytorch_model"}

# Not weights of the model: training state, and copies in other formats.
_TRAINING = (
    "training_args.* optimizer* optim_* *scheduler* rng_state* random_states* scaler.* sampler* dataloader* dl_state* "
    "*_optim_states.pt *_model_states.pt trainer_state* custom_checkpoint_*"
).split()
_COPIES = (
    "consolidated* lit_model.pth shard-*-model-*-of-*.safetensors pytorch_model_fsdp.bin tf_model* flax_model* "
    "rust_model* openvino_*"
).split()
_TWIN = re.compile(r"(pytorch_model|diffusion_pytorch_model|adapter_model)(-\d+-of-\d+)?\.bin")  # the same weights
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_RANK_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_SAFETENSORS = re.compile(r"model\.safetensors(\.index\.json)?|(model|shard)-\d+-.*\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)\.safetensors|pytorch_model-\d+-of-(?P<bins>\d+)\.bin")
_VARIANT = re.compile(  # `model.fp16.safetensors`, whole or in shards
    r"(pytorch_model|diffusion_pytorch_model|model)(-\d+-of-\d+)?\.[A-Za-z]\w*(-\d+-of-\d+)?\.(safetensors|bin)"
)
_INDEX_OF_VARIANT = re.compile(r"([a-z_]+)\.(?:safetensors|bin)\.index\.(\w+)\.json")
ADAPTERS = (ADAPTER, ADAPTER_BIN)
_WHOLE = (BIN, FSDP_BIN, METADATA)  # and safetensors, and indexes: a folder with one of these holds a model

# Folders that hold copies of the weights in other formats, or the state of a training run.
FOLDERS = (
    "original onnx openvino coreml runs wandb swanlog mlruns lightning_logs tensorboard logs checkpoint-* global_step*"
    " optimizer_* pytorch_model_fsdp_* __pycache__"
).split()
WEIGHTS = (  # never copied as they are
    ".bin .ckpt .distcp .engine .ggml .gguf .h5 .mlmodel .msgpack .nemo .npy .npz .onnx .onnx_data .ot "
    ".pdparams .pickle .pkl .pt .pth .safetensors .tflite"
).split()
# What training leaves beside a model: arguments (with local paths), states, logs and plots. Optimizer and scheduler
# states are caught by their suffix; a pipeline's `scheduler_config.json` belongs to the model.
_LEFTOVERS = (
    "*.index.json adapter_config.json *.partial *.lock *.log *.out events.out.tfevents.* "
    "args.json args.yaml *_args.json *_args.yaml *_args.yml training_params.json training_config.* train_config.* "
    "hyperparameters.yaml hparams.yaml llamaboard_config.yaml axolotl_config.y*ml torchtune_config.yaml "
    "ds_config*.json deepspeed_config*.json fsdp_config.json accelerate_config.yaml additional_config.json "
    "trainer_state.json tokens_state.json latest latest_checkpointed_iteration.txt zero_to_fp32.py "
    "*_results.json *_results.csv trainer_log.jsonl logging.jsonl running_log.txt generated_predictions.jsonl "
    "completions_*.parquet *_loss.png train_*.png training_*.png eval_*.png "
    "model.sig *.sigstore.json"  # signatures of other bytes
).split()

ReadJson = Callable[[str], dict[str, Any]]  # reads a JSON file of the model, by its path


@dataclass(frozen=True)
class Part:
    """Weight files that a loader opens together."""

    files: tuple[str, ...]  # paths in the model, in the order they are read and written
    stem: str = "model"  # their name in an output, without suffix
    index: str | None = None  # path of the index that names them
    beside: bool = False  # a single extra file, in no index

    @property
    def folder(self) -> str:
        """Their folder, the prefix of their tensors' names: "" or "2_Dense/"."""
        if self.files[0].endswith(f"/{METADATA}"):  # torch.distributed names tensors without the folder
            return ""
        return self.files[0][: self.files[0].rfind("/") + 1]


@dataclass(frozen=True)
class Contents:
    """What the files of a model are."""

    paths: tuple[str, ...]  # of all files
    parts: tuple[Part, ...]  # the weights: the model's own first, if it has any
    own: tuple[str, ...]  # the model's own files; none if all weights are in parts
    side: tuple[str, ...] = ()  # files to copy
    indexes: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # by path
    adapters: tuple[str, ...] = ()  # sub-folders with an adapter, which is not part of the model
    adapter: str | None = None  # the weights of the adapter that this is
    dcp: str | None = None  # where it is a torch.distributed checkpoint: "" or "name/"


def sort_files(
    paths: Sequence[str],
    read: ReadJson,
    role: str,
    ref: str,
    label: str,
    *,
    copy_code: bool,
    with_torch: bool = True,
    every: Callable[[], Sequence[str]] | None = None,
) -> Contents:
    """Say what each file of a model is. Without `with_torch`, files that torch saved are not weights, as on a hub.

    `every` lists the files of other merges in the folder too, for the message if there is no model. Raises
    CheckpointError if none is a model, or if it is not clear which is, and for an invalid index.
    """

    def nothing() -> CheckpointError:
        return CheckpointError(f"{label} {no_model(paths if every is None else every(), role, ref)}")

    read = functools.cache(read)
    top = [name for name in paths if "/" not in name]
    bins: list[str] = []  # the torch.save file, or the index of several
    adapter = dcp = None
    has_safetensors = any(map(_SAFETENSORS.fullmatch, top))  # others may merely lie beside a model
    if with_torch and not has_safetensors:
        bins = [name for name in (BIN, BIN_INDEX, FSDP_BIN) if name in top][:1]
    if role in ("sft", "model") and ADAPTER_CONFIG in top and MODEL not in top and INDEX not in top:
        formats = ADAPTERS if with_torch and not bins else (ADAPTER,)
        adapter = next((name for name in formats if name in top), None)
    if with_torch and not (has_safetensors or bins or adapter or "common.pt" in top):  # common.pt: Megatron
        dcp = next((prefix for prefix in ("", FSDP_FOLDER) if f"{prefix}{METADATA}" in paths), None)
    index_path = BIN_INDEX if bins == [BIN_INDEX] else INDEX
    index = read(index_path) if index_path in top else None
    own = component(top, read) if adapter is None and dcp is None else None
    if own is None:
        if adapter is not None:
            names = [adapter]
        else:
            names = [] if dcp is not None else _own_files(top, bins, index, ref, label, nothing)
        own = Part(tuple(names), index=index_path if index is not None and MODEL not in names else None)
    below, adapters = parts_below(paths, read)
    parts = tuple(part for part in (own, *parts_beside(top, own.files), *below) if part.files)
    if not parts and dcp is None:
        raise nothing()
    of_adapters = tuple(adapters)
    side = (
        path
        for path in paths
        if is_side_file(path, copy_code=copy_code) or (path.startswith(of_adapters) and not path.endswith("/"))
    )
    indexes = {} if index is None else {index_path: index}
    indexes |= {part.index: read(part.index) for part in parts if part.index}
    return Contents(tuple(paths), parts, own.files, tuple(side), indexes, of_adapters, adapter, dcp)


def _own_files(
    top: Sequence[str],
    bins: list[str],
    index: dict[str, Any] | None,
    ref: str,
    label: str,
    nothing: Callable[[], CheckpointError],
) -> list[str]:
    """Return the files that are the model, in the order they are read and written. Raises `nothing()` for none."""
    if bins and bins != [BIN_INDEX]:
        return bins
    if index is not None:
        named = index_files(index, f"{ref}/{BIN_INDEX if bins else INDEX}", ".bin" if bins else ".safetensors")
        if MODEL not in top:
            return named
    if MODEL in top:
        return [MODEL]
    if holds_parts(top):
        return []  # all weights are in parts
    found = [n for n in top if n.endswith(".safetensors") and n != ADAPTER]
    lacking = lacks_index(found or top)
    if lacking is not None:
        raise CheckpointError(f"{label} {lacking}; copy or download what is missing")
    if len(found) == 1 or are_shards(found):
        return found
    if found:
        raise CheckpointError(
            f"{label} holds neither {MODEL} nor {INDEX}, but {len(found)} other safetensors files"
            f" ({', '.join(map(shown, found[:4]))}{', …' if len(found) > 4 else ''}); give the one to use by its path"
        )
    raise nothing()


def lacks_index(names: Iterable[str]) -> str | None:
    """Say which index is missing where files are numbered shards of one model; None if they are not.

    >>> lacks_index(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    'lacks model.safetensors.index.json, which belongs to its 2 shards'
    """
    shards = [found for name in names if is_shard(name) and (found := _NUMBERED.fullmatch(name))]
    if not shards:
        return None
    stem, count = shards[0]["stem"], _count(shards[0])
    index = index_of("", stem if stem in MAIN else MAIN[0]) if stem else BIN_INDEX
    others = f", and {count - len(shards)} of those" if len(shards) < count else ""
    return f"lacks {index}, which belongs to its {count} shards{others}"


def is_shard(name: str) -> bool:
    """Whether a file is one of several numbered shards, which an index names.

    >>> is_shard("model-00001-of-00002.safetensors"), is_shard("model-00001-of-00001.safetensors")
    (True, False)
    """
    found = _NUMBERED.fullmatch(name)
    return found is not None and _count(found) > 1 and not _RANK_SHARD.fullmatch(name)


def _count(shard: re.Match[str]) -> int:
    return int(shard["count"] or shard["bins"])


def no_model_file(name: str, beside: Sequence[str], role: str, folder: str) -> str:
    """Say what to give instead of a file that is not of safetensors; `beside` are the names in its folder.

    >>> no_model_file("config.json", ["config.json", "model.safetensors"], "base", "run")
    "is not a .safetensors file; give its folder, 'run'"
    """
    whole = [each for each in beside if each.endswith((".safetensors", ".index.json")) or each in _WHOLE]
    if holds_parts(beside) or any(each not in ADAPTERS for each in whole):
        return f"is not a .safetensors file; give its folder, '{shown(folder, 400)}'"
    if any(each in beside for each in (*ADAPTERS, ADAPTER_CONFIG)):
        return adapter_file(beside, role, folder)
    form = other_form([name], [], folder)
    return f"is {form}" if form else f"is not a .safetensors file; give {MODEL_PLACE}"


def is_side_file(path: str, *, copy_code: bool = False) -> bool:
    """Whether a file of a model folder is copied into a merged one.

    `path` is relative to the folder, with forward slashes. Everything is copied (tokenizer, chat template,
    generation config, processors, sub-folders) except weights of any format, training leftovers, pickles,
    hidden files, signatures, code (unless `copy_code`: it would run on the machine of whoever loads the model), links
    to folders (which end in a slash), and the files that a merge writes itself.

    >>> is_side_file("tokenizer.json"), is_side_file("model.safetensors"), is_side_file("modeling_x.py")
    (True, False, False)
    """
    *folders, name = PurePosixPath(path).parts
    if path.endswith("/") or path in (*OWN, STATEMENT_FILE) or any(part.startswith(".") for part in (*folders, name)):
        return False
    if any(fnmatchcase(folder, pattern) for folder in folders for pattern in FOLDERS):
        return False
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in WEIGHTS or any(fnmatchcase(name, pattern) for pattern in _LEFTOVERS):
        return False
    return copy_code or suffix not in (".py", ".pyc")


def are_shards(names: Sequence[str]) -> bool:
    """Whether safetensors files are one model's, written rank by rank."""
    return bool(names) and all(map(_RANK_SHARD.fullmatch, names))


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names a file or one of its parent folders (`vit.safetensors`, `2_Dense`).

    >>> matches("2_Dense/model.safetensors", ["2_Dense"]), matches("a/vit.pt", ["*.pt"]), matches("vit.pt", ["vit"])
    (True, True, False)
    """
    places = [str(PurePosixPath(path)), *map(str, PurePosixPath(path).parents)]
    named = [pattern.rstrip("/") for pattern in patterns]
    # Compare literally too: brackets or a star in a name mean something else in a pattern.
    return any(place == pattern or fnmatchcase(place, pattern) for place in places for pattern in named)


def holds_parts(top: Iterable[str]) -> bool:
    """Whether a folder is a model of several parts, none of which need be at the top level."""
    return any(name in SPLIT for name in top)


def component(top: Sequence[str], read: ReadJson) -> Part | None:
    """Return the weights of a diffusers component that was saved alone; None for other folders."""
    if MODEL in top or INDEX in top or any(name.startswith("pytorch_model") for name in top) or holds_parts(top):
        return None
    return _main("", [name for name in top if name.startswith(MAIN[1])], read)


def parts_beside(top: Sequence[str], own: Sequence[str]) -> list[Part]:
    """Return the extra weight files at the top level of a model, each a part."""
    if MODEL in own and INDEX in top:  # the shards repeat its tensors
        top = [name for name in top if not _SHARD.fullmatch(name)]
    return [Part((name,), stem_of(name), beside=True) for name in top if name not in own and _holds_weights(name, own)]


def parts_below(paths: Sequence[str], read: ReadJson) -> tuple[list[Part], list[str]]:
    """Return the parts in sub-folders of a model, and the sub-folders that hold an adapter, which is not a part.

    `read` parses an index. Raises CheckpointError for an invalid one.
    """
    below: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder and name and not is_aside(folder):
            below.setdefault(f"{folder}/", []).append(name)
    parts: list[Part] = []
    adapters = []
    for folder, names in below.items():
        if ADAPTER_CONFIG in names:
            adapters += [folder] if any(name in names for name in ADAPTERS) else []
            continue
        main = _main(folder, names, read)
        own = [PurePosixPath(path).name for path in main.files] if main else []
        parts += [main] if main else []
        parts += [
            Part((folder + name,), stem_of(name), beside=True)
            for name in names
            if name not in own and _holds_weights(name, own)
        ]
    return parts, adapters


def is_aside(folder: str) -> bool:
    """Whether a folder of a model holds copies in other formats or training leftovers."""
    parts = folder.split("/")
    return any(part.startswith(".") or fnmatchcase(part, pattern) for part in parts for pattern in FOLDERS)


def _holds_weights(name: str, own: Sequence[str]) -> bool:
    """Whether a file holds weights that are not a copy of those in `own`."""
    if not name.endswith(READ) or name.startswith(".") or name in ADAPTERS:
        return False
    if any(fnmatchcase(name, pattern) for pattern in (*_TRAINING, *_COPIES)):
        return False
    is_copy = _TWIN.fullmatch(name) or _VARIANT.fullmatch(name)
    return not (is_copy and any(each not in ADAPTERS for each in own))  # beside an adapter, a model is not a copy


def _main(folder: str, names: Sequence[str], read: ReadJson) -> Part | None:
    """Return the files that a loader opens in a folder; None if there are none."""
    for stems, ending in ((dict(zip(MAIN, MAIN, strict=True)), ".safetensors"), (_MAIN_BIN, ".bin")):
        for stem, written in stems.items():
            if f"{stem}{ending}" in names:
                return Part((f"{folder}{stem}{ending}",), written)
            index = f"{stem}{ending}.index.json"
            if index in names:
                return _indexed(folder, index, written, ending, read)
        variants = [name for name in names if (found := _VARIANT.fullmatch(name)) and found[4] == ending[1:]]
        if variants and not re.search(r"-\d+-of-\d+", variants[0]):
            return Part((folder + variants[0],), stem_of(variants[0]))
        for index, stem, variant in ((n, f[1], f[2]) for n in names if (f := _INDEX_OF_VARIANT.fullmatch(n))):
            if variants and index.startswith(f"{stem}{ending}"):
                return _indexed(folder, index, f"{_MAIN_BIN.get(stem, stem)}.{variant}", ending, read)
    return None


def _indexed(folder: str, index: str, stem: str, ending: str, read: ReadJson) -> Part:
    files = index_files(read(folder + index), folder + index, ending)
    return Part(tuple(folder + name for name in files), stem, folder + index)


def stem_of(name: str) -> str:
    """Return the name of a weight file in an output, without folder and suffix."""
    stem, dot, variant = PurePosixPath(name).stem.partition(".")
    return (_MAIN_BIN.get(stem, stem) if name.endswith(".bin") else stem) + dot + variant


def index_of(folder: str, stem: str) -> str:
    """Return the path of a part's index, `model.safetensors.index.json`."""
    stem, dot, variant = stem.partition(".")
    return f"{folder}{stem}.safetensors.index{dot}{variant}.json"


def index_files(index: Mapping[str, Any], where: str, suffix: str) -> list[str]:
    """Return the files that an index names. Raises CheckpointError unless they are plain names with that suffix."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{shown(where)} has no weight_map; download it again, or delete it if it is stale")
    strange = [name for name in weight_map.values() if not isinstance(name, str)]
    names = strange[:1] or sorted(set(weight_map.values()))
    for name in names:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{shown(where)} names '{shown(name)}'; only plain names of files beside it are allowed"
            )
        if not name.endswith(suffix):
            kind = "safetensors" if suffix == ".safetensors" else suffix
            raise CheckpointError(f"{shown(where)} names '{shown(name)}', which is not a {kind} file")
    return names


def leave_out_option(*paths: str) -> str:
    """Return the options that leave files out, ready to paste into a shell."""
    return " ".join(f"--leave-out {quoted(path)}" for path in paths)


def quoted(path: str) -> str:
    """Return a path as a quoted shell word; for Python callers messages turn it into a list item."""
    word = shlex.quote(path)
    return word if word.startswith("'") else f"'{word}'"
