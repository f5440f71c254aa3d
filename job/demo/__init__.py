"""`make demo`: a generated data set and base model, so that a sweep runs without GPU or account."""
