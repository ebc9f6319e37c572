"""Was it real? Measurements of samples of models before and after self-improvement."""
