"""Metrics, plots, tables and the report."""
