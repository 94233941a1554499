"""One file per criterion; each exports `score(profile)` or `select(profile, r, rng)`.

Where the score is no positive weight, `share(profile)` [L, E] says how much an expert counts in a mixture (`graft.mixture`).
"""
