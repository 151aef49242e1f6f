"""Text-to-image pipelines: their parts, how they read, what they lose, how they draw, who judges that, how they are saved."""
