"""What the bucket says of a sweep, for people: status, report, best adapter. Imports no torch."""
