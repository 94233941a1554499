"""Going on from what was trained: a new site that joins a finished federation, a new run from an adapter."""
