"""Prompt templates, one module per system."""
