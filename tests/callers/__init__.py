"""The interface to callers: messages, accepted values, types, exit statuses, paths."""
