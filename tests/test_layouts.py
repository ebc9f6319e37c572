"""Merges of real architectures, loaded back by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from checkpoints import State, files_of, random_state, read_model, same_bits, write_model
from mergekit_imm import MergeReport, dare_merge, merge_checkpoints
from mergekit_imm.errors import MismatchError
from models import LAYOUTS, dtypes_in, exact_state, fine_tuned, load, new_model, save, template, untied

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = [name for name, layout in LAYOUTS.items() if layout.tied]
SHARDED_BASE = ("llama", "qwen3_moe", "gemma3")  # the others have one file, and an sft in shards


class Pair(NamedTuple):
    """A base and its fine-tuned model on disk."""

    layout: str
    base: Path
    sft: Path


def write_pair(layout: str, folder: Path) -> Pair:
    model = new_model(layout)
    shards = {True: "20KB", False: "5GB"}
    base = save(model, folder / "base", "base", shards[layout in SHARDED_BASE])
    sft = save(fine_tuned(model, seed=2), folder / "sft", "sft", shards[layout not in SHARDED_BASE])
    return Pair(layout, base, sft)


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair merged without dropping."""
    out = tmp_path_factory.mktemp("plain") / "out"
    merge_checkpoints(pair.base, pair.sft, out, alpha=0.3, drop=0.0)
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("qwen2", tmp_path_factory.mktemp("qwen2"))


def header(file: Path) -> tuple[list[tuple[str, str, list[int]]], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and its metadata."""
    content = file.read_bytes()
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = entries.pop("__metadata__")
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    return [(name, entry["dtype"], entry["shape"]) for name, entry in ordered], metadata


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def assert_same_bits(state: State, expected: State) -> None:
    assert sorted(state) == sorted(expected)
    assert [name for name in expected if not same_bits(state[name], expected[name])] == []


def assert_index_is_right(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert index["weight_map"] == {name: file.name for file in files for name, _, _ in header(file)[0]}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_model(folder).values())


# --- every layout


def test_files_hold_the_names_a_layout_is_known_by(pair: Pair) -> None:
    names = {LAYOUTS[pair.layout].known_by, LAYOUTS[pair.layout].embedding}
    assert names <= set(read_model(pair.base)) & set(read_model(pair.sft))
    sharded = [len(list(folder.glob("*.safetensors"))) > 1 for folder in (pair.base, pair.sft)]
    assert sorted(sharded) == [False, True]


def test_a_merged_model_loads_with_no_key_missing_or_left_over(pair: Pair, plain: Path) -> None:
    model = load(plain, pair.layout)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == LAYOUTS[pair.layout].tied == config_of(plain)["tie_word_embeddings"]


def test_loaded_tensors_are_the_mean_rounded_once(pair: Pair, plain: Path) -> None:
    base, sft, merged = (exact_state(folder, pair.layout) for folder in (pair.base, pair.sft, plain))
    assert sorted(merged) == sorted(base)
    for name, tensor in merged.items():
        mean = 0.3 * base[name] + 0.7 * sft[name]
        spacing = torch.ldexp(torch.ones_like(mean), torch.frexp(mean).exponent - 8)  # of bfloat16
        float32 = 2**-23 * (base[name].abs() + sft[name].abs())
        assert ((tensor - mean).abs() <= spacing / 2 + float32).all(), name
        assert not torch.equal(tensor, base[name]), name


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_every_tensor_has_the_bits_of_dare_merge(pair: Pair, tmp_path: Path, drop: float) -> None:
    out = tmp_path / "out"
    report = merge_checkpoints(pair.base, pair.sft, out, alpha=0.3, drop=drop, seed=5)
    base, sft = read_model(pair.base), read_model(pair.sft)
    assert_same_bits(read_model(out), dare_merge(base, sft, alpha=0.3, drop=drop, seed=5))
    assert report.tensors == {"merged": len(base), "kept": 0, "taken": 0, "copied": 0}
    load(out, pair.layout)


def test_the_output_lies_as_the_base_does(pair: Pair, plain: Path) -> None:
    files = sorted(file.name for file in pair.base.glob("*.safetensors"))
    assert sorted(file.name for file in plain.glob("*.safetensors")) == files
    assert [header(plain / file) for file in files] == [header(pair.base / file) for file in files]
    assert (plain / "model.safetensors.index.json").exists() == (len(files) > 1)
    if len(files) > 1:
        assert_index_is_right(plain)


def test_tokenizer_and_generation_config_are_those_of_the_sft(pair: Pair, plain: Path) -> None:
    assert AutoTokenizer.from_pretrained(plain).chat_template == template("sft")
    tokens = PreTrainedTokenizerFast.from_pretrained(plain).tokenize("merge back sft base")
    assert tokens == ["merge", "back", "sft", "<unk>"]
    assert GenerationConfig.from_pretrained(plain).stop_strings == ["sft"]


# --- dtypes


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A bfloat16 base and a float32 sft, whose nested configs say so too."""
    folder, model = tmp_path_factory.mktemp("wide"), new_model(request.param)
    base = save(model, folder / "base", "base")
    sft = save(fine_tuned(model, seed=2, dtype=torch.float32), folder / "sft", "sft")
    config = config_of(sft)
    for place, key in (("text_config", "dtype"), ("vision_config", "torch_dtype")):
        if place in config:
            config[place][key] = "float32"
    (sft / "config.json").write_text(json.dumps(config))
    return Pair(request.param, base, sft)


@pytest.mark.parametrize(
    ("dtype", "written", "code"),
    [(None, torch.bfloat16, "BF16"), ("float32", torch.float32, "F32"), ("float16", torch.float16, "F16")],
)
def test_a_float32_sft_is_merged_into_the_dtype_of_the_base_or_the_one_asked_for(
    wide: Pair, tmp_path: Path, dtype: str | None, written: torch.dtype, code: str
) -> None:
    out = tmp_path / "out"
    report = merge_checkpoints(wide.base, wide.sft, out, drop=0.5, dtype=dtype)
    assert {entry[1] for entry in header(out / "model.safetensors")[0]} == {code}
    base, sft = read_model(wide.base), read_model(wide.sft)
    assert {tensor.dtype for tensor in sft.values()} == {torch.float32}
    assert_same_bits(read_model(out), dare_merge(base, sft, drop=0.5, dtype=written))

    said, name = dtypes_in(config_of(out)), str(written).removeprefix("torch.")
    assert said == dict.fromkeys(dtypes_in(config_of(wide.sft)), name)
    assert report.config_changes == ({} if written == torch.float32 else said)
    model = load(out, wide.layout)
    assert model.config.dtype == written
    assert {tensor.dtype for tensor in model.state_dict().values()} == {written}


# --- one tensor or two: tied heads


def stored(state: State, form: str) -> State:
    """A model's tensors as a file may hold them: its ends as one tensor under one name or both, or as two."""
    rest = {name: tensor for name, tensor in state.items() if name not in (EMBED, HEAD)}
    ends = {
        "embedding": {EMBED: state[EMBED]},
        "both": {EMBED: state[EMBED], HEAD: state[EMBED].clone()},
        "head": {HEAD: state[EMBED]},
        "apart": {EMBED: state[EMBED], HEAD: state[HEAD]},
    }
    return rest | ends[form]


class Tied(NamedTuple):
    """A tied model and two that were tuned from it; each has a head of its own, with which to break the tie."""

    config: dict[str, Any]
    states: dict[str, State]

    def write(self, role: str, form: str, folder: Path) -> tuple[Path, State]:
        state = stored(self.states[role], form)
        names = sorted(state, key=lambda name: (name != EMBED, name == HEAD))
        shards = [names[:9], names[9:]] if role == "base" else None
        return write_model(folder / role, state, shards=shards, config=self.config), state


@pytest.fixture(scope="module")
def tied(qwen2: Pair) -> Tied:
    states = {"base": read_model(qwen2.base), "start": read_model(qwen2.sft)}
    states["sft"] = {name: tensor + torch.full_like(tensor, 0.01) for name, tensor in states["start"].items()}
    for number, state in enumerate(states.values()):
        state.update(random_state({HEAD: state[EMBED].shape}, seed=number))
    return Tied(config_of(qwen2.base), states)


FORMS = [
    (base, sft, start)
    for base in ("embedding", "both")
    for sft in ("embedding", "both", "head")
    for start in (None, "embedding", "both", "head")
]


@pytest.mark.parametrize(("base_form", "sft_form", "start_form"), FORMS)
def test_a_tied_tensor_is_one_tensor_by_whatever_names_the_files_hold_it(
    tied: Tied, tmp_path: Path, base_form: str, sft_form: str, start_form: str | None
) -> None:
    base, _ = tied.write("base", base_form, tmp_path)
    sft, _ = tied.write("sft", sft_form, tmp_path)
    start = tied.write("start", start_form, tmp_path)[0] if start_form else None
    report = merge_checkpoints(base, sft, tmp_path / "out", start=start, drop=0.5, iteration=1 if start else 0)

    one = {role: stored(state, "embedding") for role, state in tied.states.items()}
    expected = dare_merge(
        one["base"], one["sft"], start=one["start"] if start else None, drop=0.5, iteration=1 if start else 0
    )
    if base_form == "both":
        expected[HEAD] = expected[EMBED]
    assert_same_bits(read_model(tmp_path / "out"), expected)
    assert_index_is_right(tmp_path / "out")
    assert report.notes == []
    assert report.tensors["merged"] == len(one["base"])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    model = load(tmp_path / "out", "qwen2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same_bits(model.get_input_embeddings().weight.detach(), expected[EMBED])


@pytest.mark.parametrize(
    ("base_form", "sft_form", "start_form", "blamed"),
    [
        ("embedding", "apart", None, "sft"),
        ("both", "apart", None, "sft"),
        ("apart", "apart", None, "base"),
        ("apart", "both", None, "base"),
        ("embedding", "apart", "embedding", "sft"),
        ("embedding", "apart", "head", "sft"),
        ("both", "apart", "both", "sft"),
        ("both", "apart", "apart", "sft"),
        ("embedding", "both", "apart", "start"),
        ("apart", "embedding", "head", "base"),
    ],
)
def test_a_tie_that_an_input_breaks_is_merged_as_two_tensors_and_said(
    tied: Tied, tmp_path: Path, base_form: str, sft_form: str, start_form: str | None, blamed: str
) -> None:
    forms = {"base": base_form, "sft": sft_form} | ({"start": start_form} if start_form else {})
    folders, states = {}, {}
    for role, form in forms.items():
        folders[role], states[role] = tied.write(role, form, tmp_path)
    out = tmp_path / "out"
    iteration = 1 if start_form else 0
    report = merge_checkpoints(
        folders["base"], folders["sft"], out, start=folders.get("start"), drop=0.5, iteration=iteration
    )

    def side(role: str, name: str) -> Tensor:
        other = EMBED if name == HEAD else HEAD
        return states[role][name] if name in states[role] else states[role][other]

    expected = {
        name: dare_merge(
            side("base", name),
            side("sft", name),
            start=side("start", name) if start_form else None,
            drop=0.5,
            name=name,
            iteration=iteration,
        )
        for name in tied.states["base"]
    }
    assert_same_bits(read_model(out), expected)
    assert_index_is_right(out)
    assert config_of(out)["tie_word_embeddings"] is False
    assert report.config_changes == {"tie_word_embeddings": False}
    (note,) = report.notes
    assert note.startswith(f"note: {blamed} ")
    assert ("its config ties them" in note) == (blamed == "base")
    assert all(word in note for word in (EMBED, HEAD, "under their own names", "untied"))
    model = load(out, "qwen2")
    assert same_bits(model.get_input_embeddings().weight.detach(), expected[EMBED])
    assert same_bits(model.get_output_embeddings().weight.detach(), expected[HEAD])


def test_equal_ends_are_written_tied_though_the_sft_says_untied(tied: Tied, tmp_path: Path) -> None:
    base, _ = tied.write("base", "embedding", tmp_path)
    sft, _ = tied.write("sft", "both", tmp_path)
    (sft / "config.json").write_text(json.dumps(tied.config | {"tie_word_embeddings": False}))
    report = merge_checkpoints(base, sft, tmp_path / "out")
    assert report.config_changes == {"tie_word_embeddings": True}
    model = load(tmp_path / "out", "qwen2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_mask_of_a_tied_tensor_does_not_depend_on_the_names_in_the_sft(tied: Tied, tmp_path: Path) -> None:
    base, _ = tied.write("base", "head", tmp_path)
    merged = []
    for form in ("head", "embedding"):
        sft, _ = tied.write("sft", form, tmp_path / form)
        merge_checkpoints(base, sft, tmp_path / form / "out", drop=0.5)
        merged.append(read_model(tmp_path / form / "out"))
        load(tmp_path / form / "out", "qwen2")
    assert_same_bits(*merged)


@pytest.mark.parametrize("head", [[], [HEAD]], ids=["no head stored", "a head stored"])
def test_an_encoder_s_and_a_decoder_s_embedding_are_two_tensors_and_break_no_tie(
    tmp_path: Path, head: list[str]
) -> None:
    """As in Marian without shared embeddings: its head is tied to the decoder's."""
    encoder, decoder = (f"model.{part}.embed_tokens.weight" for part in ("encoder", "decoder"))
    base = random_state({encoder: (8, 64), decoder: (8, 64)})
    sft = {name: tensor + torch.ones_like(tensor) for name, tensor in base.items()}
    config = {"model_type": "marian", "dtype": "bfloat16", "tie_word_embeddings": True}
    base_folder, sft_folder = (
        write_model(tmp_path / role, state | {name: state[decoder].clone() for name in head}, config=config)
        for role, state in (("base", base), ("sft", sft))
    )
    report = merge_checkpoints(base_folder, sft_folder, tmp_path / "out", drop=0.5)
    expected = dare_merge(base, sft, drop=0.5)
    assert_same_bits(read_model(tmp_path / "out"), expected | dict.fromkeys(head, expected[decoder]))
    assert report.notes == []
    assert config_of(tmp_path / "out") == config


@pytest.mark.parametrize("says", ["untied", "tied"])
@pytest.mark.parametrize("layout", TIED)
def test_a_head_trained_on_its_own_stays_one_in_every_layout(layout: str, tmp_path: Path, says: str) -> None:
    model = new_model(layout)
    base = save(model, tmp_path / "base", "base")
    sft = save(untied(model, seed=3), tmp_path / "sft", "sft")
    if says == "tied":
        (sft / "config.json").write_text((base / "config.json").read_text())
    report = merge_checkpoints(base, sft, tmp_path / "out", drop=0.5)
    assert len(report.notes) == 1
    merged, states = read_model(tmp_path / "out"), {"base": read_model(base), "sft": read_model(sft)}
    embedding = LAYOUTS[layout].embedding
    (head,) = set(merged) - set(states["base"])
    expected = dare_merge(states["base"][embedding], states["sft"][head], drop=0.5, name=head)
    assert same_bits(merged[head], expected)
    loaded = load(tmp_path / "out", layout)
    assert same_bits(loaded.get_output_embeddings().weight.detach(), expected)
    assert same_bits(loaded.get_input_embeddings().weight.detach(), merged[embedding])
    config = config_of(tmp_path / "out")
    assert {level["tie_word_embeddings"] for level in (config, config.get("text_config", config))} == {False}


# --- side files

FROM_SFT = [
    "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "2_Dense/config.json", "LICENSE",
]  # fmt: skip
FROM_BASE = ["additional_chat_templates/tools.jinja", "1_Pooling/config.json", "NOTICE.txt"]
LEFT_OUT = [
    "checkpoint-10/config.json", "checkpoint-10/model.safetensors", "consolidated.safetensors", "model.gguf",
    "modeling_x.py", "onnx/model.onnx", "onnx/config.json", "optimizer.pt", "original/params.json",
    "original/consolidated.00.pth", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "rng_state_0.pth", "runs/host/events.out.tfevents.1", "all_results.json",
    "scheduler.pt", "trainer_state.json", "training_args.bin", "wandb/run-1/config.yaml", "README.md",
]  # fmt: skip
HIDDEN = [".git/config", ".gitattributes", ".cache/lock.json"]


@pytest.fixture(scope="module")
def cluttered(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair amid all that lies about in model folders; each file says whose it is."""
    folder = tmp_path_factory.mktemp("cluttered")
    state = random_state({EMBED: (8, 4), "model.layers.0.w": (4, 4)})
    clutter = [*FROM_SFT, *LEFT_OUT, *HIDDEN]
    config = {"model_type": "llama", "tie_word_embeddings": True, "dtype": "bfloat16"}
    base, sft = (
        write_model(
            folder / role, state, config={**config, "of": role}, side={name: f"{role}'s {name}" for name in names}
        )
        for role, names in (("base", [*clutter, *FROM_BASE]), ("sft", clutter))
    )
    return Pair("", base, sft)


@pytest.fixture(scope="module")
def tidy(cluttered: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MergeReport]:
    out = tmp_path_factory.mktemp("tidy") / "out"
    return out, merge_checkpoints(cluttered.base, cluttered.sft, out)


def test_side_files_are_the_sft_s_where_it_has_them_and_else_the_base_s(tidy: tuple[Path, MergeReport]) -> None:
    out, report = tidy
    own = {"imm_recipe.json", "imm_report.json", "README.md", "model.safetensors", "config.json"}
    sides = {name: content.decode() for name, content in files_of(out).items() if name not in own}
    assert sides == {name: f"sft's {name}" for name in FROM_SFT} | {name: f"base's {name}" for name in FROM_BASE}
    assert config_of(out)["of"] == "sft"
    assert report.side_files == {"sft": sorted([*FROM_SFT, "config.json"]), "base": sorted(FROM_BASE)}


def test_what_is_left_out_is_listed(tidy: tuple[Path, MergeReport]) -> None:
    out, report = tidy
    assert report.left_out == {"base": sorted(LEFT_OUT), "sft": sorted(LEFT_OUT)}
    assert json.loads((out / "imm_report.json").read_text())["left_out"] == report.left_out


def test_the_model_card_is_ours(tidy: tuple[Path, MergeReport], cluttered: Pair) -> None:
    card = (tidy[0] / "README.md").read_text()
    assert card.startswith("---\nbase_model:\n")
    assert str(cluttered.base) in card
    assert "README.md" not in card


def test_code_is_copied_when_asked_for(cluttered: Pair, tmp_path: Path, tidy: tuple[Path, MergeReport]) -> None:
    report = merge_checkpoints(cluttered.base, cluttered.sft, tmp_path / "out", copy_code=True)
    assert sorted(files_of(tmp_path / "out")) == sorted([*files_of(tidy[0]), "modeling_x.py"])
    assert (tmp_path / "out" / "modeling_x.py").read_text() == "sft's modeling_x.py"
    assert "modeling_x.py" not in report.left_out["sft"]


# --- files and rounds


def test_a_new_layout_holds_the_same_tensors(pair: Pair, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(pair.base, pair.sft, out, alpha=0.3, drop=0.0, max_shard_size="20KB")
    assert_same_bits(read_model(out), read_model(plain))
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert_index_is_right(out)
    state = read_model(out)
    assert all(sum(state[name].nbytes for name, _, _ in header(file)[0]) <= 20_000 for file in files)
    load(out, pair.layout)


def test_a_new_layout_of_one_file_has_no_index(llama: Pair, tmp_path: Path) -> None:
    merge_checkpoints(llama.base, llama.sft, tmp_path / "sharded")
    merge_checkpoints(llama.base, llama.sft, tmp_path / "out", max_shard_size="5GB")
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert_same_bits(read_model(tmp_path / "out"), read_model(tmp_path / "sharded"))
    load(tmp_path / "out", "llama")


def test_a_file_as_base_gives_a_folder_with_all_else_from_the_sft(qwen2: Pair, tmp_path: Path) -> None:
    merge_checkpoints(qwen2.base, qwen2.sft, tmp_path / "folders", drop=0.5)
    folder = write_model(tmp_path / "base", read_model(qwen2.base), side={"config.json": "not read", "NOTICE": ""})
    report = merge_checkpoints(folder / "model.safetensors", qwen2.sft, tmp_path / "out", drop=0.5)
    assert_same_bits(read_model(tmp_path / "out"), read_model(tmp_path / "folders"))
    assert set(report.side_files) == {"sft"}
    assert config_of(tmp_path / "out") == config_of(qwen2.sft)
    load(tmp_path / "out", "qwen2")


def test_a_file_as_sft_gives_a_folder_with_all_else_from_the_base(llama: Pair, tmp_path: Path) -> None:
    merge_checkpoints(llama.base, llama.sft, tmp_path / "folders", drop=0.5)
    report = merge_checkpoints(llama.base, llama.sft / "model.safetensors", tmp_path / "out", drop=0.5)
    assert_same_bits(read_model(tmp_path / "out"), read_model(tmp_path / "folders"))
    assert set(report.side_files) == {"base"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template("base")
    load(tmp_path / "out", "llama")


def test_a_file_of_any_name_is_written_as_model_safetensors(qwen2: Pair, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes((qwen2.base / "model.safetensors").read_bytes())
    merge_checkpoints(file, qwen2.base / "model.safetensors", tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == [
        "README.md",
        "imm_recipe.json",
        "imm_report.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_model_merged_with_itself_is_that_model(pair: Pair, tmp_path: Path, drop: float) -> None:
    report = merge_checkpoints(pair.base, pair.base, tmp_path / "out", alpha=0.3, drop=drop)
    assert_same_bits(read_model(tmp_path / "out"), read_model(pair.base))
    assert any("same model" in note for note in report.notes)


def test_a_round_from_a_merged_model_counts_on(llama: Pair, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"round{number}" for number in range(3))
    merge_checkpoints(llama.base, llama.sft, first, drop=0.5)
    sfts = []
    for number, start in enumerate((first, second)):
        tuned = fine_tuned(load(start, "llama"), seed=10 + number)
        sfts.append(save(tuned, tmp_path / f"sft{number}", "sft"))
        merge_checkpoints(llama.base, sfts[-1], (second, third)[number], start=start, drop=0.5)

    recipes = [json.loads((folder / "imm_recipe.json").read_text()) for folder in (first, second, third)]
    assert [recipe["parameters"]["iteration"] for recipe in recipes] == [0, 1, 2]
    assert [[past["parameters"]["iteration"] for past in recipe["history"]] for recipe in recipes] == [[], [0], [0, 1]]
    base = read_model(llama.base)
    for number, (start, out) in enumerate(((first, second), (second, third)), 1):
        expected = dare_merge(base, read_model(sfts[number - 1]), start=read_model(start), drop=0.5, iteration=number)
        assert_same_bits(read_model(out), expected)
        load(out, "llama")


def test_a_start_that_is_the_base_is_round_zero(llama: Pair, tmp_path: Path) -> None:
    for out, start in (("none", None), ("base", llama.base)):
        merge_checkpoints(llama.base, llama.sft, tmp_path / out, start=start)
    assert files_of(tmp_path / "base") == files_of(tmp_path / "none")


# --- tensors with a rule of their own


def test_kept_taken_and_undropped_tensors(wide: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keep, take, no_drop = r"norm", r"self_attn\.q_proj", r"mlp\.(up|down)_proj"
    report = merge_checkpoints(wide.base, wide.sft, out, drop=0.5, keep=[keep], take=[take], no_drop=[no_drop])
    base, sft = read_model(wide.base), read_model(wide.sft)
    expected = dare_merge(base, sft, drop=0.5)
    undropped = dare_merge(base, sft, drop=0.0)
    for name in base:
        if re.search(keep, name):
            expected[name] = base[name]
        elif re.search(take, name):
            expected[name] = sft[name].to(torch.bfloat16)
        elif re.search(no_drop, name):
            expected[name] = undropped[name]
    assert_same_bits(read_model(out), expected)
    kept, taken = (sum(bool(re.search(pattern, name)) for name in base) for pattern in (keep, take))
    assert report.tensors == {"merged": len(base) - kept - taken, "kept": kept, "taken": taken, "copied": 0}
    load(out, wide.layout)


BUFFERS = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]


@pytest.mark.parametrize(("owner", "option"), [("base", "keep"), ("sft", "take")])
def test_tensors_that_one_side_has_alone_need_a_rule(llama: Pair, tmp_path: Path, owner: str, option: str) -> None:
    """Old Llama files hold the rotary frequencies, new ones do not; transformers reads both."""
    states = {"base": read_model(llama.base), "sft": read_model(llama.sft)}
    buffers = random_state(dict.fromkeys(BUFFERS, (4,)), dtype=torch.float32)
    folders = {
        role: write_model(tmp_path / role, state | (buffers if role == owner else {}), config=config_of(llama.base))
        for role, state in states.items()
    }
    with pytest.raises(MismatchError, match=rf"2 tensors are in {owner} .* only.*inv_freq.* --{option} "):
        merge_checkpoints(folders["base"], folders["sft"], tmp_path / "refused")
    assert not list(tmp_path.glob("refused*"))

    rules = {"keep": (), "take": ()} | {option: ("inv_freq$",)}
    merge_checkpoints(folders["base"], folders["sft"], tmp_path / "out", keep=rules["keep"], take=rules["take"])
    written = buffers if owner == "base" else {name: tensor.bfloat16() for name, tensor in buffers.items()}
    assert_same_bits(read_model(tmp_path / "out"), dare_merge(states["base"], states["sft"]) | written)
    load(tmp_path / "out", "llama")
