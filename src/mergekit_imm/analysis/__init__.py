"""The diagnosis: where the weights of a model changed, against where they matter."""
