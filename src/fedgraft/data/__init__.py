"""Data: examples, datasets, their division among clients, and batches of token ids."""
