"""The documents of a sweep in its bucket, and who may write them."""
