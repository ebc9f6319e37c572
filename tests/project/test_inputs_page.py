"""Each row of the table of input forms in docs/inputs.md has a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "inputs.md"

ROWS = {
    "a folder of safetensors": "transforms/layouts/test_layouts.py::test_every_tensor_has_the_bits_of_dare_merge",
    "one file": "refusals/test_no_model.py::test_one_of_several_safetensors_files_can_be_given_by_its_path",
    "a hub id": "checkpoint/test_hub_merge.py::test_a_pair_on_a_hub_is_planned_refused_merged_and_merged_again_offline",
    "a LoRA adapter, as `SFT`": "transforms/test_adapters.py::test_it_is_what_peft_s_own_merge_gives",
    "another adapter (PiSSA and others that change their base, IA3, …)":
        "transforms/test_adapters_refused.py::test_what_is_not_plain_lora_is_refused_by_name",
    "PyTorch files": "checkpoint/test_torch_save.py::test_a_model_of_transformers_is_merged_and_loaded",
    "a `torch.distributed` checkpoint": "checkpoint/test_pieces.py::test_pieces_of_ranks_are_merged_as_the_whole",
    "safetensors that ranks wrote, in pieces":
        "checkpoint/test_pieces.py::test_so_are_those_of_fsdp_and_what_torch_joined",
    "a model of several parts": "checkpoint/test_parts.py::test_all_parts_are_merged_and_their_masks_keyed_by_the_path",
    "names that differ": "transforms/test_names.py::test_the_text_part_of_a_wrapped_model",
    "experts, fused or one by one": "transforms/test_names.py::test_names_in_memory_are_those_of_the_files",
    "experts stored transposed":
        "transforms/layouts/test_experts.py::test_one_of_the_models_has_them_the_other_way_round",
    "the text part of a model that sees": "transforms/layouts/test_text_part.py::test_it_is_merged_into_the_whole",
    "vocabularies of different sizes":
        "transforms/vocab/test_rows.py::test_rows_that_both_have_are_merged_and_the_rest_is_the_owner_s",
    "a tied head that is stored, or not":
        "transforms/layouts/test_ties.py::test_a_tied_tensor_is_one_tensor_by_whatever_names_the_files_hold_it",
    "FP8 with scales (DeepSeek, Qwen and Llama FP8, compressed-tensors, modelopt, fbgemm, ComfyUI)":
        "transforms/test_dequantize.py::test_it_is_what_transformers_dequantises",
    "GPTQ, AWQ, bitsandbytes, MXFP4 and other quantised models":
        "refusals/test_quantised.py::test_a_config_that_says_so_is_refused",
    "a model that is quantised in part": "transforms/test_partly_quantised.py::test_it_is_merged_and_loads",
    "DeepSpeed": "checkpoint/test_refused.py::test_other_forms_are_refused_with_what_to_run",
    "verl, SkyRL": "checkpoint/test_refused.py::test_other_forms_are_refused_with_what_to_run",
    "Megatron; rank files of accelerate": "checkpoint/test_refused.py::test_other_forms_are_refused_with_what_to_run",
    "LitGPT": "checkpoint/test_refused.py::test_other_forms_are_refused_with_what_to_run",
    "GGUF, TensorFlow, Flax, ONNX, other pickles":
        "refusals/test_no_model.py::test_folders_without_a_model_are_refused_by_name",
    "a folder above a model": "refusals/test_no_model.py::test_a_folder_above_a_model_is_answered_with_its_place",
}  # fmt: skip


def test_each_row_has_its_test() -> None:
    table = re.search(r"\| form \| recognised by \|.*?\n\n", PAGE.read_text(), re.DOTALL)
    assert table is not None
    forms = [line.split(" | ")[0].removeprefix("| ") for line in table[0].strip().splitlines()[2:]]
    assert forms == list(ROWS)
    for place in ROWS.values():
        file, name = place.split("::")
        tree = ast.parse((TESTS / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place
