"""A dialogue at the terminal: one file each for the loop, an answer, commands, settings, the line.

Only the surface of a `Session` is used, never an engine, so that any conversation can stand behind.
"""
