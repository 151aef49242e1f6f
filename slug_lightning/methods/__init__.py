"""How an edit is found."""
