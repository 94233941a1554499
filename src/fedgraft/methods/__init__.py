"""One file per federated method; each exports `build(**options) -> Method`."""
