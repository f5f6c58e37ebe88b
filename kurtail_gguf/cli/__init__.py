"""The command line: one click command a file. Builds settings, calls the library, draws progress."""
