"""One merge by many processes: the same bytes, whoever ends when."""
