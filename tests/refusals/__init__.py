"""What a merge refuses: one line with what was found, where, and the cure; and nothing is written."""
