"""What tools/benchmark.py measures, one module per kind of thing."""
