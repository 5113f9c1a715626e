"""Names from files on a terminal."""


def one_line(text: str) -> str:
    """`text` with line ends, terminal commands and half characters shown as codes: a file may have put them there."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
