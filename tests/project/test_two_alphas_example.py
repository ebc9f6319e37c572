"""The example that serves two alphas in turn gives what the merged checkpoints give."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mergekit_imm import merge_checkpoints
from models import fine_tuned, load, new_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_alphas.py"


def asked(address: str, **request: Any) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(request).encode())) as answer:
        return json.loads(answer.read())


def test_two_alphas_in_turn(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    base = new_model("llama")
    sft = base
    for seed in range(20):
        sft = fine_tuned(sft, seed=seed)
    for model, role in ((base, "base"), (sft, "sft")):
        model.save_pretrained(tmp_path / role)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path / role)
    expected = {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "sft")
    for alpha in (0.1, 0.9):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / f"{alpha}", alpha=alpha, drop=0.2)
        inputs = tokenizer("w7 w8", return_tensors="pt")
        model = load(tmp_path / f"{alpha}", "llama", dtype="auto")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        expected[alpha] = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected[0.1] != expected[0.9]

    command = [sys.executable, str(EXAMPLE), "base", "sft", "0.1", "0.9", "--port", "0", "--new-tokens", "12"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            found = re.match(r"(http://\S+) serves alpha 0.1 and 0.9", server.stdout.readline())
            assert found is not None
            for alpha in (0.1, 0.9, 0.9, 0.1):
                answer = asked(found[1], prompt="w7 w8", alpha=alpha)
                assert (answer["alpha"], answer["text"]) == (alpha, expected[alpha])
            with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                asked(found[1], prompt="w7 w8", alpha=0.5)
            assert "served are [0.1, 0.9]" in json.loads(refused.value.read())["error"]
            refused.value.close()
        finally:
            server.kill()  # a signal that the runner ignores would be ignored by its children too
