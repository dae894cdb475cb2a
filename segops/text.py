"""Text for terminals."""


def printable(text):
    """The text with escapes for line breaks and whatever else would steer a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
