"""Vocabularies of different sizes: resized by transformers, merged, loaded, and compared with the formulas."""
