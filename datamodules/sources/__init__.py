"""What is given as forget and retain, made into loaders for each split."""
