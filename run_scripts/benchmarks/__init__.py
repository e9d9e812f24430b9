"""What benchmark.py measures, a file a subject."""
