"""The same conversation with a server elsewhere."""
