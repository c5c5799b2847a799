"""llama.cpp, loaded as placed: load, run, log, abort, measure."""
