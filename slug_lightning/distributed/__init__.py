"""What knows ranks: exchange between processes, sharing of batches, the backward pass under a strategy."""
