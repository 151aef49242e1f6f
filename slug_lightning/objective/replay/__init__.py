"""Evaluate an edit by computing only what it can change."""
