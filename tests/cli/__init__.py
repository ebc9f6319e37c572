"""Commands as users run them."""
