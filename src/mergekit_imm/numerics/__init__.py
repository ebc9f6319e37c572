"""The arithmetic: mask, statistics, torch reference, and compiled kernels that give the same bits."""
