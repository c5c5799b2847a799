"""Files on disk: they are read without trust, and written as a whole."""
