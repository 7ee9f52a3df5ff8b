"""The one error of converters."""

from __future__ import annotations


class ConversionError(Exception):
    """A file, a data set or a recipe does not work.

    Attributes:
        code: stable, such as `bad_model` or `bad_data`.
        detail: a sentence that ends in the remedy.
        field: what was at fault: `sources`, `calibration`, `evaluation` or `labels`; None when none of them.
    """

    def __init__(self, code: str, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field

    def __reduce__(self) -> tuple[type[ConversionError], tuple[str, str, str | None]]:
        """By its three parts: it may come from another process."""
        return type(self), (self.code, self.detail, self.field)
