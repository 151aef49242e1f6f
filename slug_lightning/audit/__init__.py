"""Does it hold? Attacks on what a module has forgotten, one a file."""
