"""The experiments behind the command line. Nothing in the core imports them."""


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that says what to do."""
