"""ICU: which passages are forgotten, and rest (arXiv 2407.20271)."""
