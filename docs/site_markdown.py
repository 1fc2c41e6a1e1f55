"""What turns Markdown that reads on a code host as it is into the site: equations, links to the code, the API.

A Markdown extension, which `mkdocs.yml` names; it changes a page's text before anything else reads it.
"""

import re

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

CODE = "https://github.com/mivpg/mivpg/blob/main"
EQUATION = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_EQUATION = re.compile(r"\$`([^`]+)`\$")
API_LINE = re.compile(r"^- \[`(\w+)`\]\(\.\./src/([\w/]+)\.py#L\d+\): .*$", re.MULTILINE)


class SitePreprocessor(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        """A page's lines, and what becomes of them."""
        text = "\n".join(lines)
        text = EQUATION.sub(equation, text)
        text = INLINE_EQUATION.sub(lambda match: convert(match[1]), text)
        text = API_LINE.sub(lambda match: f"::: {module_of(match[2])}.{match[1]}", text)  # each name in full
        return text.replace("](../", f"]({CODE}/").split("\n")


class SiteExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        """Before fenced code, which has 25, and raw HTML."""
        md.preprocessors.register(SitePreprocessor(md), "site", 30)


def equation(match: re.Match[str]) -> str:
    """One on a line of its own."""
    return f'<div class="equation">{convert(match[1].strip(), display="block")}</div>'


def module_of(path: str) -> str:
    """`mivpg.datasets` of mivpg/datasets/__init__."""
    return path.removesuffix("/__init__").replace("/", ".")


def makeExtension(**options) -> SiteExtension:
    """What Markdown calls."""
    return SiteExtension(**options)
