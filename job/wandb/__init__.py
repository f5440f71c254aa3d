"""W&B: runs that show the bucket's trials, and sweeps that suggest parameters for them."""
