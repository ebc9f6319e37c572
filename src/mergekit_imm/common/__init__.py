"""What every room uses: JSON from strangers, texts of messages, checks of values, the version."""
