"""Merges of real models, small ones built with transformers, loaded back with transformers."""
