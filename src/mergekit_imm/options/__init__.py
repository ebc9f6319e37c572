"""Options of a merge, layer factors, sweeps and the recipe."""
