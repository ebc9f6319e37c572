"""Models in formats other than safetensors, written by torch, transformers and peft: merged to the same bytes as in
safetensors."""
