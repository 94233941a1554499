"""Trainable inserts on a frozen MoE block, their leaves kept outside the base module."""
