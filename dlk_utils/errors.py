"""The errors that a user can fix.

All of them are subclasses of `DlkError`. Each message says what was expected, what was found, and
where.
"""

MOST_CHARACTERS = 1600
MOST_LINES = 24
"""Of a message that is shown: together about a screen."""


class DlkError(Exception):
    """Base class of every error that a user of this package can fix.

    A message that is longer than a screen is shown without its middle: its beginning says what was
    expected, and its end says what to do.
    """

    def __str__(self) -> str:
        message = super().__str__()
        lines = message.splitlines(keepends=True)
        if len(lines) > MOST_LINES:
            n_end = MOST_LINES // 4
            n_begin = MOST_LINES - n_end - 1
            left_out = f"[... {len(lines) - n_begin - n_end:,} lines are left out ...]\n"
            message = "".join([*lines[:n_begin], left_out, *lines[-n_end:]])
        if len(message) > MOST_CHARACTERS:
            n_end = MOST_CHARACTERS // 4
            n_begin = MOST_CHARACTERS - n_end
            left_out = f" [... {len(message) - MOST_CHARACTERS:,} characters are left out ...] "
            message = message[:n_begin] + left_out + message[-n_end:]
        return message


class ChoiceError(DlkError, ValueError):
    """Two choices that the model's next token cannot tell apart."""


class DataError(DlkError, ValueError):
    """A data set, or a selection of its rows, that cannot be used."""


class TooFewRows(DlkError, ValueError):
    """A split without enough rows of each class to fit or score a probe on."""


class TemplateError(DlkError, ValueError):
    """A question template that cannot be used."""


class UnknownArchitecture(DlkError, ValueError):
    """A model whose sites are not known, or do not keep the conventions of `models.sites`."""


class CardError(DlkError, ValueError):
    """A probe card of another model, or one that does not score its own fixture as it did."""


class ParameterError(DlkError, TypeError, ValueError):
    """An unknown parameter, or a value that a parameter or an argument does not take."""


class ModelError(DlkError, RuntimeError):
    """A model that cannot be loaded."""


class DeadDropout(DlkError, RuntimeError):
    """Two dropout draws that do not differ, or dropout at a place where the model has none."""


class StoreError(DlkError, RuntimeError):
    """A store that cannot be read or written."""


class BookError(DlkError, RuntimeError):
    """The book cannot be built, or one of its notebooks fails."""
