"""Where else a run's figures go, one file each: exports `PACKAGE` and `start(about) -> Recorder` (see `report/recording.py`)."""
