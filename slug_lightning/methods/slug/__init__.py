"""SLUG: one layer, one searched step along its forget gradient (arXiv 2407.11867)."""
