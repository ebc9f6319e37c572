"""Make inputs comparable: match names, apply LoRA, dequantize FP8, align experts and vocabularies."""
