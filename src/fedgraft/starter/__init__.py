"""From a user's rows to a first recipe: what the settings are, which suit the rows, and the recipe as a commented file."""
