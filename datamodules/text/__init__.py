"""Passages of text, from files."""
