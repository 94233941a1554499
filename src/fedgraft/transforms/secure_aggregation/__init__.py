"""Secure aggregation: the coordinator learns the sum of the clients' changes, and of no client the change."""
