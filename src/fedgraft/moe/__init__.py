"""Mixture-of-Experts models: where a family keeps its blocks, and what passes through them."""
