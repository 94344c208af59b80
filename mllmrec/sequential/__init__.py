"""Sequential baselines: items as vectors, users as sequences of items."""
