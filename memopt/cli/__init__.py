"""The command ``memopt``: `app` has its commands, `asked` reads what they are given."""

from memopt.cli.app import main

__all__ = ["main"]
