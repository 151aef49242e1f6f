"""The one exception for what a user can mend."""


class UnlearnError(ValueError):
    """Input that cannot lead to a result; the message names the argument and the remedy. The model is as it was.

    Example:
        >>> raise UnlearnError("forget: the set is empty; give at least three samples")
        Traceback (most recent call last):
        ...
        slug_lightning.errors.UnlearnError: forget: the set is empty; give at least three samples
    """
