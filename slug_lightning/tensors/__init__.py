"""One tensor, whole or sharded: which may be edited, how it is read and written, and its digests."""
