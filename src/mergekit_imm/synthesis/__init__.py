"""Data for a loop: which answers to keep, new questions, mixtures. Functions of strings; no model inside."""
