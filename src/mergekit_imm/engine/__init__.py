"""A plan carried out: workers, streaming, reports, verification."""
