"""Models in other forms than safetensors files: written by torch, transformers, peft; merged as the same model is that
safetensors holds, to the byte."""
