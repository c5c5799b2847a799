"""Rounding that knows what a matrix is multiplied by."""
