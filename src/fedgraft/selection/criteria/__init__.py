"""One file per criterion; each exports `score(profile)` or `select(profile, r, rng)`."""
