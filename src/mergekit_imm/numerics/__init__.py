"""The arithmetic: the mask, statistics, the torch reference, and the compiled kernels that give the same bits."""
