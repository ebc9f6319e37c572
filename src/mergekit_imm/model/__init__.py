"""What names of tensors and config.json say about a model."""
