"""`python -m slug_lightning.cli`, as a launcher of several processes starts it."""

from slug_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
