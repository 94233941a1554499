"""One module per dataset: `METRIC` (`rougeL` or `exact_match`) and `load(split, path)`; rows may bring choices."""
