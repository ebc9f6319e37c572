"""Do two models have the same tokens? Tokenizers as transformers and tokenizers write them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from checkpoints import files_of, random_state, read_model, same_bits, write_model
from loading import EMBED, HEAD
from mergekit_imm import (
    CheckpointError,
    MergeError,
    MismatchError,
    iter_merged,
    merge_checkpoints,
)
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.plan.describe import check
from mergekit_imm.transforms.tokenizer_files import token_table
from models import fine_tuned, load, new_model
from refused import shown_options
from thorough import examples
from vocabularies import EXTRA, WORDS, resize, save, tokenizer_of, write_pair

ENDS = (EMBED, HEAD)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 96 rows and 90 tokens; an sft with ten more tokens and 100 rows."""
    return write_pair("llama", tmp_path_factory.mktemp("pair"))


def forms(folder: Path) -> dict[str, tuple[Path, dict[str, int]]]:
    """Tokenizers in every supported form, and their vocabularies according to their library."""
    bpe = models.BPE({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, [("a", "b")])
    made: dict[str, Any] = {
        "BPE": Tokenizer(bpe),
        "Unigram": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0)),
        "WordPiece": Tokenizer(models.WordPiece({"[UNK]": 0, "x": 1, "##y": 2})),
        "WordLevel": Tokenizer(models.WordLevel({"x": 0, "y": 1}, "x")),
    }
    found = {}
    for name, tokenizer in made.items():
        tokenizer.add_special_tokens(["<pad>"])
        (folder / name).mkdir(parents=True)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        found[name] = folder / name, tokenizer.get_vocab()
    for name, model, kind in (
        ("vocab.json", bpe, transformers.CTRLTokenizer),
        ("vocab.txt", models.WordPiece({"[UNK]": 0, "[PAD]": 1, "x": 2, "##y": 3}), transformers.BertTokenizerLegacy),
    ):
        (folder / f"{name}.source").mkdir()
        slow = kind(*model.save(str(folder / f"{name}.source")), unk_token="<unk>" if name == "vocab.json" else "[UNK]")
        slow.add_tokens(["<call>"])
        slow.save_pretrained(folder / name)
        found[name] = folder / name, slow.get_vocab()
    return found


def test_tokens_are_read_from_every_form(tmp_path: Path) -> None:
    for name, (folder, vocabulary) in forms(tmp_path).items():
        write_model(folder, {"w": torch.zeros(1)})
        assert ("tokenizer.json" in files_of(folder)) == name.isalpha()
        table = token_table(open_checkpoint(folder, "base"))
        assert {token: number for number, token in table.items()} == vocabulary, name
        assert "<pad>" in vocabulary or "<call>" in vocabulary


@pytest.mark.parametrize("vocab", ["base", "sft"])
def test_different_tokens_are_refused_and_listed(tmp_path: Path, vocab: str) -> None:
    """Also for equal sizes, once a vocabulary is chosen; the shown cure works."""
    model = new_model("llama")
    save(model, tmp_path / "base", tokenizer_of(WORDS))
    others = [*WORDS[:40], *(f"v{n}" for n in range(40, 44)), *WORDS[44:]]
    for rows in (96, 100):
        save(resize(fine_tuned(model, seed=2), rows), tmp_path / "sft", tokenizer_of(others))
        with pytest.raises(
            MismatchError,
            match=r"4 of the first 96 ids are different tokens in base .* and sft .*: 40 \('w37' and 'v40'\), 41"
            r" \('w38' and 'v41'\), 42 \('w39' and 'v42'\) and 1 more; rows of different tokens are not merged",
        ) as caught:
            merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", vocab=vocab)
        assert not (tmp_path / "out").exists()
    (option,) = shown_options(caught.value.args[0])
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", take=option["take"])
    out, sft = read_model(tmp_path / "out"), read_model(tmp_path / "sft")
    assert all(same_bits(out[name], sft[name]) for name in ENDS)
    assert load(tmp_path / "out", "llama").config.vocab_size == 100


def test_tokens_that_only_one_has_are_no_difference(tmp_path: Path) -> None:
    """Rows that are padding in the base and tokens in the sft."""
    model = new_model("llama")
    save(model, tmp_path / "base", tokenizer_of(WORDS))
    save(resize(fine_tuned(model, seed=2), 100), tmp_path / "sft", tokenizer_of(WORDS, EXTRA[:3]))
    for vocab in ("base", "sft"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / f"out-{vocab}", vocab=vocab)


def test_strict_says_which_tokens_are_more_and_what_can_be_done(pair: Path, tmp_path: Path) -> None:
    for dry_run in (True, False):
        with pytest.raises(
            MismatchError,
            match=r"embed_tokens\.weight' is BF16 \[96, 32\] in base .* and BF16 \[100, 32\] in sft .*sft's tokenizer"
            r" has 10 more: '<pad>' \(90\), '<call0>' \(91\), '<call1>' \(92\) and 7 others\);"
            r" .*vocab=\"base\" or vocab=\"sft\"",
        ):
            merge_checkpoints(pair / "base", pair / "sft", tmp_path / "out", dry_run=dry_run)
    bare = tmp_path / "bare"
    shutil.copytree(pair / "sft", bare)
    for damage in ("", '{"model": 3}', None):
        (bare / "tokenizer.json").unlink() if damage is None else (bare / "tokenizer.json").write_text(damage)
        with pytest.raises(MismatchError, match=r"the vocabularies differ; choose one"):
            merge_checkpoints(pair / "base", bare, tmp_path / "out")


def test_nothing_is_parsed_while_sizes_are_the_same(tmp_path: Path) -> None:
    for role in ("base", "sft"):
        write_model(tmp_path / role, random_state({EMBED: (8, 4)}), side={"tokenizer.json": f"no JSON, {role}"})
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"base .*: tokenizer\.json is not JSON"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "other", vocab="sft")


def test_without_a_tokenizer_it_is_said_that_nothing_was_compared(tmp_path: Path) -> None:
    for role, rows in (("base", 8), ("sft", 9)):
        write_model(tmp_path / role, random_state({EMBED: (rows, 4)}))
    report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", vocab="sft")
    assert "base has no tokenizer, so the models' tokens were not compared" in report.notes[0].replace(
        str(tmp_path / "base"), ""
    ).replace("  ", " ")


def test_sentencepiece_models_are_compared_byte_by_byte(tmp_path: Path) -> None:
    for role, rows in (("base", 8), ("sft", 9)):
        write_model(tmp_path / role, random_state({EMBED: (rows, 4)}), side={"tokenizer.model": "pieces"})
    (tmp_path / "sft" / "added_tokens.json").write_text('{"<pad>": 8}')
    given = tmp_path / "base", tmp_path / "sft"
    assert len(merge_checkpoints(*given, tmp_path / "out", vocab="sft").notes) == 1
    (tmp_path / "base" / "added_tokens.json").write_text('{"<bos>": 7}')
    (tmp_path / "sft" / "added_tokens.json").write_text('{"<pad>": 7}')
    with pytest.raises(MismatchError, match=r"1 of the first 8 ids .*: 7 \('<bos>' and '<pad>'\)"):
        merge_checkpoints(*given, tmp_path / "other", vocab="sft")
    (tmp_path / "sft" / "tokenizer.model").write_text("others")
    with pytest.raises(CheckpointError, match=r"cannot be compared: base .* has only tokenizer\.model"):
        merge_checkpoints(*given, tmp_path / "other", vocab="sft")


def test_tokens_without_a_row_in_both_may_differ(tmp_path: Path) -> None:
    for role, rows, last in (("base", 90, "<a>"), ("sft", 91, "<b>")):
        write_model(tmp_path / role, random_state({EMBED: (rows, 4)}))
        tokenizer_of(WORDS, [last]).save_pretrained(tmp_path / role)
    for vocab in ("base", "sft"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / f"out-{vocab}", vocab=vocab)


def test_added_tokens_are_also_found_in_the_tokenizer_s_config(tmp_path: Path) -> None:
    folder, vocabulary = forms(tmp_path)["vocab.txt"]
    write_model(folder, {"w": torch.zeros(1)})
    (folder / "added_tokens.json").unlink()
    assert {token: number for number, token in token_table(open_checkpoint(folder, "sft")).items()} == vocabulary


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": {"vocab": {"a": "0"}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": true}}}'),
        ("tokenizer.json", '{"model": {"vocab": [[1, 2.0]]}}'),
        ("tokenizer.json", '{"model": {"vocab": ["a"]}}'),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}'),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": {"a": 1}}'),
        ("tokenizer.json", '{"model": []}'),
        ("tokenizer.json", "[]"),
        ("vocab.json", '{"a": {"b": 1}}'),
        ("added_tokens.json", '{"a": null}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "a"}}'),
        ("vocab.txt", "\udcff"),
    ],
)
def test_what_is_no_table_of_tokens_is_refused(tmp_path: Path, name: str, content: str) -> None:
    write_model(tmp_path, {"w": torch.zeros(1)})
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=rf"sft .*: {name} is not understood as a table of tokens and their ids"):
        token_table(open_checkpoint(tmp_path, "sft"))


@given(data=st.data())
@settings(max_examples=examples(100))
def test_damaged_tokenizers_end_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    source, _ = data.draw(st.sampled_from(list(forms(folder / "forms").values())))
    given = folder / "base", folder / "sft"
    for role, rows in (("base", 4), ("sft", 5)):
        write_model(folder / role, random_state({EMBED: (rows, 2)}))
        for path in source.iterdir():
            shutil.copy(path, folder / role)
    path = data.draw(st.sampled_from(sorted(path for path in given[1].iterdir() if path.suffix in (".json", ".txt"))))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content = content or bytearray(b"0")
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.sampled_from(b'{}[]",:0-9e.nN\\u\xff'))
        else:
            del content[at : at + data.draw(st.integers(1, 40))]
    path.write_bytes(content)
    for vocab in ("strict", "base"):
        with suppress(MergeError):
            list(iter_merged(*given, vocab=vocab))


def test_a_check_says_so_where_sizes_are_the_same(tmp_path: Path) -> None:
    model = new_model("llama")
    save(model, tmp_path / "base", tokenizer_of(WORDS))
    save(fine_tuned(model, seed=2), tmp_path / "sft", tokenizer_of([*WORDS[:-1], "other"]))
    found = check(tmp_path / "base", tmp_path / "sft")
    assert found.problems == []
    assert "1 of the first 96 ids are different tokens" in found.notes[-1]
    assert "'other'" in found.notes[-1]
    save(fine_tuned(model, seed=2), tmp_path / "sft", tokenizer_of(WORDS))
    assert check(tmp_path / "base", tmp_path / "sft").notes == []
