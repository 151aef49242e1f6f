"""One tensor, whole or sharded: which may be edited, how it is read and written, what tells its content."""
