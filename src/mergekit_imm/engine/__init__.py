"""Execute a plan: workers, streaming, reports, verification."""
