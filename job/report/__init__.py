"""Status, report and best adapter of a sweep, read from the bucket alone. Imports no torch."""
