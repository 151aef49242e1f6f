"""Images with texts, from files."""
