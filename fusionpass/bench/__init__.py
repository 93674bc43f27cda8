"""What `fusionpass bench` does: measure the ops on a CUDA GPU, keep a run in a file, show it, compare it with another."""

MODES = ("eager", "default", "reduce-overhead")  # the modes in which a whole model is measured
