"""A dialogue at the terminal: one file each for the loop, an answer, commands, settings, the line.

Only the surface of a `Dialogue` is used, so that an engine or a server can stand behind it.
"""
