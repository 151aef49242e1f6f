"""What knows Lightning's Trainer, below the callbacks."""
