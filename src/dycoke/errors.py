"""The one error that is ours alone: what was asked for cannot work here."""


class UnsupportedError(RuntimeError):
    """Raised where DyCoke cannot do what was asked, with the reason and the way out.

    A value outside its allowed range is a ``ValueError`` or ``TypeError`` instead.
    """
