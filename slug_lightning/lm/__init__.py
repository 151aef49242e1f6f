"""What is special about causal language models: what they recite, how that is measured, and the losses that take it away."""
