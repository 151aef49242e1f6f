"""Pictures with texts, from files."""
