"""A loader for vLLM that merges while it loads: no merged checkpoint is written.

    vllm serve BASE --tokenizer SFT --load-format mergekit_imm \\
        --model-loader-extra-config '{"sft": "SFT", "alpha": 0.5}'

vLLM finds `register` by the entry point `mergekit_imm` of the group `vllm.general_plugins`. The model is the base; the
extra config has `sft` and the options of `iter_merged`. Every rank of tensor or pipeline parallelism merges the whole
model, layer by layer, and vLLM's `load_weights` keeps what is the rank's own, as when it loads from a folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..common.checks import described
from ..common.messages import shown
from ..engine.merge import iter_merged
from ..errors import ArgumentError

LOAD_FORMAT = "mergekit_imm"


def register() -> None:
    """Register the load format with vLLM, in the process that calls this."""
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

    class MergingLoader(BaseModelLoader):  # type: ignore[misc]
        """Loads base + sft, merged."""

        def download_model(self, model_config: Any) -> None:
            """Check the inputs from their headers, and download them."""
            self.get_all_weights(model_config, None).close()

        def get_all_weights(self, model_config: Any, model: Any) -> Any:  # noqa: ARG002
            """Return the merged tensors; vLLM's `reload_weights` calls this too."""
            return merged_weights(model_config.model, model_config.revision, self.load_config.model_loader_extra_config)

        def load_weights(self, model: Any, model_config: Any) -> None:
            """Load the merged tensors into a model of vLLM."""
            weights = self.get_all_weights(model_config, model)
            model.load_weights(weights)
            for _ in weights:  # to the end: that no input changed meanwhile is checked there
                pass

    register_model_loader(LOAD_FORMAT)(MergingLoader)


def merged_weights(base: str, revision: str | None, extra: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the tensors of a base merged with the sft of vLLM's `model_loader_extra_config`, layer by layer.

    Raises MergeError, before any tensor is read, if the extra config or the models are not right.
    """
    known = [name for name in inspect.signature(iter_merged).parameters if name not in ("base", "order")]
    if not isinstance(extra, dict) or not extra.get("sft"):
        what = described(extra) if not isinstance(extra, dict) else f"without sft: {shown(extra)}"
        raise ArgumentError(
            f"load format {LOAD_FORMAT} takes the fine-tuned model from model_loader_extra_config, which is {what};"
            ' give --model-loader-extra-config \'{"sft": "FOLDER", "alpha": 0.5}\''
        )
    unknown = next((name for name in extra if name not in known), None)
    if unknown is not None:
        raise ArgumentError(
            f"model_loader_extra_config has '{shown(unknown)}', which load format {LOAD_FORMAT} does not know; it takes"
            f" {', '.join(known)}"
        )
    pinned = f"{base}@{revision}" if revision and not Path(base).exists() else base
    return iter_merged(pinned, order="layers", **extra)
