"""What the other packages share and that has no idea of unlearning."""
