"""What becomes of the best adapter."""
