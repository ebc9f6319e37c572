"""What Python callers and users of commands meet beside merges: messages, values, types, exit statuses, paths."""
