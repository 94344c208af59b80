"""Text generation for many rows at once."""
