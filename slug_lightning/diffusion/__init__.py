"""Text-to-image pipelines: how they are read, what they lose, how they draw, and who judges what they have drawn."""
