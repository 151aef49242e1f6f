"""What a run found: reports, their figures, their way to loggers, the files of a run."""
