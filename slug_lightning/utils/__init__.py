"""Helpers for the other packages that know nothing of unlearning."""
