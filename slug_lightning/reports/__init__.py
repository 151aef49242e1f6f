"""What a run found: reports, figures, loggers, and the files of a run."""
