"""Output folders that are whole or absent: direct writes, paths and locks, the journal, publishing, results."""
