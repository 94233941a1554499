"""Leaves that were trained elsewhere, taken over as the start of a run: a PEFT adapter, an export, another run's shared leaves."""
