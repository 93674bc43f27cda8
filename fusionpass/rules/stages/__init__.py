"""What a core match grows over: one file per stage, each with its `STAGE`. A rule lists its stages, in order."""
