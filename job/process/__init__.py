"""The process itself: how it is told to end, how a hang is found, its work folder, its GPU."""
