"""dots1 in torch as plain functions; calibration, training and tests use it."""
