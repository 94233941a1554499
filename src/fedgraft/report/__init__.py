"""Records of a run, and the tables, figures and page made of them."""
