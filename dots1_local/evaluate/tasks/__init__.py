"""Scores of lm-evaluation-harness's tasks, asked of a server in this process.

catalog finds and loads tasks, harness turns their questions into requests, estimate counts the
requests, run lets the server answer them, answers keeps what was answered, and scores compares.
"""
