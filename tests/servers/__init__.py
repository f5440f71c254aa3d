"""Servers that the tests start on the loopback address and stop again."""
