"""Make the models of docs/change.md: a base of 12 layers, an sft of it, and the importance of the base's layers.

    python docs/scripts/change_example.py FOLDER [--write]

The base learns to count in steps of 1 to 5; fine-tuning teaches it steps of 7. Importance is Eq. 3 on the base's own
data. Fifteen seconds on two cores. With --write the page
and its pictures take what was measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from matplotlib import style

from mergekit_imm import layer_importance
from mergekit_imm.analysis.change import checkpoint_change
from mergekit_imm.analysis.verdict import ModelChange, mismatch
from mergekit_imm.options.layer_factors import read_importance
from mergekit_imm.views.change_figure import change_picture, mismatch_picture
from mergekit_imm.views.change_terminal import render

DOCS = Path(__file__).resolve().parents[1]
VOCABULARY, LAYERS = 97, 12


def counting(steps: list[int], generator: torch.Generator, rows: int = 32, length: int = 24) -> torch.Tensor:
    """Return rows that count in one of these steps each, from anywhere, modulo the vocabulary."""
    first = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    step = torch.tensor(steps)[torch.randint(len(steps), (rows, 1), generator=generator)]
    return (first + step * torch.arange(length)) % VOCABULARY


def train(model: torch.nn.Module, steps: list[int], rounds: int, rate: float, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(rounds):
        data = counting(steps, generator)
        model(input_ids=data, labels=data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def report(folder: Path) -> None:
    """Measure the models, and put what the terminal shows and the pictures into the page."""
    weights = read_importance(folder / "importance.json")
    found = []
    for name in ("sft-1", "sft-2"):
        change = checkpoint_change(folder / "base", folder / name)
        found.append(ModelChange(name, change, mismatch(weights, change)))
    with style.context(Path(__file__).with_name("pictures.mplstyle")):
        for name, picture in (
            ("change-layers.png", change_picture(found, weights)),
            ("change-importance.png", mismatch_picture(found, weights)),
        ):
            (DOCS / name).write_bytes(next(iter(picture.values())))
    page = DOCS / "change.md"
    before, _, rest = page.read_text().partition("<!-- example -->\n")
    after = rest.partition("<!-- /example -->")[2]
    text = f"```text\n{render(found, weights)}\n```\n"
    page.write_text(f"{before}<!-- example -->\n{text}<!-- /example -->{after}")


def main(folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config)
    train(model, [1, 2, 3, 4, 5], 150, 2e-3, generator)
    model.save_pretrained(folder / "base")
    data = counting([1, 2, 3, 4, 5], generator, rows=128)
    importance = layer_importance(model, [{"input_ids": data, "labels": data}])
    (folder / "importance.json").write_text(json.dumps(importance.to_dict(), indent=2) + "\n")
    for name in ("sft-1", "sft-2"):
        model.zero_grad()
        train(model, [7], 20, 3e-4, generator)
        model.save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if "--write" in sys.argv:
        report(Path(sys.argv[1]))
