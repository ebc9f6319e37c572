"""Inputs made comparable: names matched, LoRA applied, FP8 dequantized, experts and vocabularies aligned."""
