"""What happens on a client: one training loop, the client's memory, local rules."""
