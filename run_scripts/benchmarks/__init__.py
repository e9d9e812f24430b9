"""What benchmark.py measures, a file per subject."""
