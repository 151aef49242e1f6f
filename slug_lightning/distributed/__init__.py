"""Exchange between ranks, sharding of batches, and the backward pass under a strategy."""
