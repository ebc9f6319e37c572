"""From headers alone: what happens to every tensor, and where every byte goes."""
