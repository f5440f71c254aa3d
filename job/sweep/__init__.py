"""The parameters for a slot: the sweep file, the built-in engine, W&B."""
