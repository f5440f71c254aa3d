"""One trial, from its settings to its commit."""
