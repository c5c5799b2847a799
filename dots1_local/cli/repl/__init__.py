"""The dialogue of `dots1 chat`, with a model here or on a server."""
