"""Text-to-image pipelines: their parts, how they read, what they lose, how they draw and are saved, and who judges what is drawn."""
