"""Merges of real, small models, built and loaded back with transformers."""
