"""Processes on several machines: the site's worker, what its settings allow, and how it is reached."""
