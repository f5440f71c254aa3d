"""Where a slot's parameters come from: the sweep file and the built-in engine."""
