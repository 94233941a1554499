"""What happens on the server: its state, merges of replies, server steps."""
