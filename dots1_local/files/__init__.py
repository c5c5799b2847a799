"""What lies on disk: read without trusting it, and written whole."""
