"""For mkdocstrings: fields that a docstring has in transformers' way, "name (`type`):", become a list."""

import re

import griffe

FIELD = re.compile(r"^(\w+) (\(`.*\)):\n", re.MULTILINE)


class FieldsAsList(griffe.Extension):
    def on_class(self, *, cls: griffe.Class, **kwargs) -> None:
        """Called for each class, before its docstring is parsed."""
        if cls.docstring:
            cls.docstring.value = FIELD.sub(r"- `\1` \2:\n", cls.docstring.value)
