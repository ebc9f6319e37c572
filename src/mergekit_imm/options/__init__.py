"""What can be asked of a merge: parameters, layer factors, sweeps, the recipe."""
