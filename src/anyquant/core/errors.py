"""Every error a user can meet, drawn once.

    AnyQuantError              1   a bug, or anything not named below
    ├── UsageError             2   a wrong option, a rule that matches nothing, an unknown name
    ├── ContractFailedError    3   measured, and worse than the stated limit
    ├── InconclusiveError      4   the evidence does not allow a verdict
    ├── BadInputError          5   a file that is damaged, incomplete or lies about itself
    ├── UnsupportedError       6   a sound input that AnyQuant, a format or a runtime cannot take
    ├── OutputError            7   the disk, a lock, an existing or unwritable output
    └── MissingExtraError      8   an optional library is not installed

The number is the exit code of the command line. A message says what was wrong, the value and the place, and what to do.
"""


class AnyQuantError(Exception):
    """Base of all errors that AnyQuant raises on purpose."""

    exit_code = 1


class UsageError(AnyQuantError):
    exit_code = 2


class ContractFailedError(AnyQuantError):
    exit_code = 3


class InconclusiveError(AnyQuantError):
    exit_code = 4


class BadInputError(AnyQuantError):
    exit_code = 5


class UnsupportedError(AnyQuantError):
    exit_code = 6


class OutputError(AnyQuantError):
    exit_code = 7


class MissingExtraError(AnyQuantError):
    exit_code = 8
