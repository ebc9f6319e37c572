"""A model as its tensor names and config.json describe it."""
