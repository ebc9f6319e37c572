"""Open checkpoints in every supported form, and read their tensors by range."""
