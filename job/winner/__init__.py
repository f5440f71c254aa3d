"""The best adapter of a sweep, taken out of the bucket for use."""
