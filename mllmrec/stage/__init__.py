"""Files between stages, options, run records."""
