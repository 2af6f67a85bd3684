"""Tools of one's own, good and bad."""

import os
import time


def shout(text):
    """Write anything; you get it in capitals.

    Not for the model.
    """
    return text.upper()


def hang(text):
    """Never comes back."""
    time.sleep(60)


def die(text):
    """Ends its process."""
    os._exit(7)


def megabyte(text):
    """Says too much."""
    return "a" * 1_000_000


def fail(text):
    """Raises."""
    raise KeyError(f"no {text}")


def number(text):
    """Returns no text."""
    return 7


def process(text):
    """Which process it runs in."""
    return str(os.getpid())


def untold(text):
    return text
