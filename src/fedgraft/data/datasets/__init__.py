"""One module per dataset: `METRIC` and `load(split, path)`."""
