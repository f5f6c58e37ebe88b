"""Files that are whole or not there, large arrays on disk, and what may be written where."""
