"""From files of rows to token tables that every trial of a sweep shares."""
