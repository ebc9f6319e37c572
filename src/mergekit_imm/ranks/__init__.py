"""One merge by many processes."""
