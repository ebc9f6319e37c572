"""What proves a new form of input, or a new device."""
