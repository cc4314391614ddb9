"""Names of published checkpoints: what they are, where they are, the cache."""
