"""What every package uses: untrusted JSON, texts of messages, checks of values, threads, the version."""
