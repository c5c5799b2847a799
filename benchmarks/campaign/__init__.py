"""What breaks, on purpose: processes, files, requests, disks, memory and workers.

`python -m benchmarks.campaign --help` says how it is run; docs/reliability.md has its figures.
"""
