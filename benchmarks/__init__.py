"""What `make bench` runs: time, memory and bytes at the model's real width."""
