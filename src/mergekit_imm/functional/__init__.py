"""The merge as pure functions of tensors."""
