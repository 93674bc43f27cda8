"""What `fusionpass bench` does: measure the ops on a CUDA GPU, keep a run in a file, show it, hold it against another."""
