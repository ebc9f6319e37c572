"""Rounds of training and merging."""
