"""One file per source of weights: its names, what becomes of its values."""
