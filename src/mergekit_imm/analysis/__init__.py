"""Diagnosis: where the weights of a model changed, and where they matter."""
