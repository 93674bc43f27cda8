"""The stages by which a core match grows: one file per stage, each with its `STAGE`. A rule lists its stages, in order."""
