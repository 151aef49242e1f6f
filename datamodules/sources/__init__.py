"""Resolve what is given as forget and retain into loaders for each split."""
