"""Many runs from one recipe: the points of a grid, each an ordinary run folder."""
