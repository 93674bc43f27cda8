"""What `fusionpass bench` does: measure the ops on a CUDA GPU, keep a run in a file, show it, hold it against another."""

MODES = ("eager", "default", "reduce-overhead")  # in which a whole model is measured
