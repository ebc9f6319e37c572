"""Files that are whole or absent: direct writes, places and locks, the journal, the exchange of folders."""
