"""Refusals: one line with what was found, where, and a cure; nothing is written."""
