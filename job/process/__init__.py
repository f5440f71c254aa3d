"""The process itself: told to end, hanging, its heartbeat, its work folder, its GPU."""
