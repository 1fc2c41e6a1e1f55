"""How the package's templates are filled in."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def make_environment(*, is_html: bool) -> Environment:
    """With the package's templates; text that is filled in is escaped in HTML alone."""
    return Environment(
        loader=PackageLoader("mivpg"),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
