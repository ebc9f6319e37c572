"""What is on disk: safetensors files, the side files around them, the folder that is written."""
