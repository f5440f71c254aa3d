"""`make demo`: a whole sweep on a real small model, without GPU, account or bucket."""
