"""Prepare docstrings for the API pages: griffe knows `Examples:` and no roles of Sphinx."""

import re

import griffe


class PlainDocstrings(griffe.Extension):
    """Rename the section `Example:`, and replace ``:func:`name` `` by the name as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of one object before it is parsed."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":(?:func|class|meth|attr|mod|data):`~?([^`]*)`", r"`\1`", text)
