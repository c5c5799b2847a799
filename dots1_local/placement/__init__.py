"""What lives where, how much it takes, and how fast it will be."""
