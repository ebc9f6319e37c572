"""Plan a merge from headers alone: what happens to every tensor, and where its bytes go."""
