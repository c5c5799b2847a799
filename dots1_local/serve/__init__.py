"""An OpenAI-compatible server: HTTP on one side, one engine thread on the other."""
