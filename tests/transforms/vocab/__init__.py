"""Vocabularies of different sizes: resized by transformers, merged, loaded back, and compared with the formulas."""
