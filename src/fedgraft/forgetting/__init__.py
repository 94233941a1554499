"""Taking one client out of a run: what is known of it by name, and its part in the merges."""
