"""Candidates as rows for a language model: training and scoring."""
