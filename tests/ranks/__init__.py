"""One merge by many processes: the same bytes, whichever process ends when."""
