"""Brings what the pages take from the code up to date: `python docs/refresh.py`, which `make docs` runs first.

docs/options.md   every option of every command, from the dataclasses and docstrings that `--help` shows
docs/api.md       every public name, with a link to its line and the first sentence of its docstring
docs/images       the drawings
all pages         the line number in a link such as [`CorrelatedSelfAttention`](../src/mivpg/layers.py#L1)
"""

import ast
import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from unittest.mock import patch

from cyclopts import App
from cyclopts.argument import Argument
from drawings import DRAWINGS, IMAGES

import mivpg
from mivpg import cli

DOCS = Path(__file__).parent
ROOT = DOCS.parent

SOURCE_LINK = re.compile(r"\[`([\w.]+)(?:\(\))?`\]\((?:\.\./)?(src/mivpg/[\w/]+\.py)#L(\d+)\)")
"""Name, file and line of a link to a class, a function or a method."""

HIDDEN = {"--help", "--version"}
SHARED = {"dataset": "train", "validation": "train"}
"""Groups of options that several commands read, and the command under which they stand."""


# ── Where a name stands ─────────────────────────────────────────────────────────────────────────────────────────────


def definitions(source: str) -> dict[str, ast.AST]:
    """Classes, functions and methods (`Class.method`) of a module's text."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}": inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def refresh_lines(text: str) -> str:
    """The page with the line of each name that it links to as it is now.

    Raises:
        KeyError: The file no longer has that name.
    """

    def as_it_is(match: re.Match[str]) -> str:
        name, file, line = match.groups()
        now = definitions((ROOT / file).read_text(encoding="utf-8"))[name].lineno
        return match[0].replace(f"#L{line}", f"#L{now}")

    return SOURCE_LINK.sub(as_it_is, text)


# ── Every public name ───────────────────────────────────────────────────────────────────────────────────────────────


def api_page() -> str:
    """docs/api.md."""
    lines = [
        "# API reference",
        "",
        "<!-- Written by docs/refresh.py. -->",
        "",
        "What `from mivpg import …` gives, module by module. Shapes use the letters of [the method](method.md).",
    ]
    for module, names in mivpg._MODULES.items():
        file = f"src/mivpg/{module.replace('.', '/')}.py"
        if not (ROOT / file).is_file():
            file = f"src/mivpg/{module}/__init__.py"
        nodes = definitions((ROOT / file).read_text(encoding="utf-8"))
        lines += ["", f"## mivpg.{module}", ""]
        for name in names:
            sentence = first_sentence(ast.get_docstring(nodes[name]) or "")
            lines.append(f"- [`{name}`](../{file}#L{nodes[name].lineno}): {sentence}")
    return "\n".join(lines) + "\n"


def first_sentence(docstring: str) -> str:
    """The first paragraph's first sentence, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s(?=[A-Z`])", paragraph)[0]


# ── Every option ────────────────────────────────────────────────────────────────────────────────────────────────────


def commands() -> dict[str, App]:
    """The command line's commands by what one types, each as an app whose arguments are its options."""
    found: dict[str, App] = {}

    def collect(prefix: str, app: App) -> None:
        for name in app:
            if name.startswith("-"):
                continue
            command = app[name]
            if command.default_command is None:
                collect(f"{prefix}{name} ", command)
            else:
                found[prefix + name] = options_app(command)

    collect("", cli.app)
    return found


def options_app(command: App) -> App:
    """Of a command that takes a YAML file the app of its fields, which `mivpg.cli.parse` would make; else itself."""
    assert command.default_command is not None
    if next(iter(command.assemble_argument_collection())).name != "ARGUMENTS":
        return command
    inner: list[App] = []

    def keep(usage: str, start, arguments, only=()) -> None:
        inner.append(App(name=usage, default_command=start, version_flags=[], help_flags=[], help=command.help))

    with patch.object(cli, "parse", keep):
        command.default_command()
    return inner[0]


def options_page() -> str:
    """docs/options.md."""
    lines = [
        "# Every option",
        "",
        "<!-- Written by docs/refresh.py from what `mivpg COMMAND --help` shows. -->",
        "",
        "`mivpg --help` lists the commands, `mivpg COMMAND --help` says what this page says. In a YAML file a field",
        "is nested by its group and written with `_` (`patch_pooling` under `model`); on the command line it is the",
        "option below, which overrides the file: `mivpg train run.yaml --model.patch-pooling abmil`. What a model can",
        "be given from Python stands under `MivpgConfig` and `MivpgQFormerConfig` of the [API reference](api.md).",
    ]
    for name, app in commands().items():
        lines += ["", f"## mivpg {name}", "", *describe(app), ""]
        arguments = list(app.assemble_argument_collection(parse_docstring=True))
        groups: dict[str, list[Argument]] = {}
        for argument in arguments:
            if argument.show and argument.name not in HIDDEN:
                groups.setdefault(group_of(argument.name), []).append(argument)
        defaults = group_defaults(arguments)
        shared = [group for group in groups if group.split(".")[0] in SHARED and name != SHARED[group.split(".")[0]]]
        for group in ("", *(group for group in groups if group not in ("", *shared))):
            if group:
                lines += ["", f"### {name}: {group}", "", meaning_of(group, arguments), ""]
            lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
            for argument in groups.get(group, []):
                lines.append(row(argument, defaults.get(group, {})))
        if shared:
            links = {group.split(".")[0] for group in shared}
            lines += [
                "",
                "Also " + " and ".join(f"`--{group}.…`, as of [train](#mivpg-train)" for group in sorted(links)) + ".",
            ]
    return "\n".join(lines) + "\n"


def describe(app: App) -> list[str]:
    """What the command is for."""
    text = (app.help or "").split("\nArgs:")[0].strip()
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")[:1]]


def group_of(name: str) -> str:
    """`model.qformer` of --model.qformer.hidden-size; empty for an option of the command itself."""
    return name.lstrip("-").replace("-", "_").rpartition(".")[0]


def meaning_of(group: str, arguments: list[Argument]) -> str:
    """What the class of a group's fields is for: its docstring without what it says of arguments and errors."""
    (hint,) = (argument.hint for argument in arguments if argument.name.lstrip("-").replace("-", "_") == group)
    kind = next(kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type) and kind is not type(None))
    return " ".join((inspect.getdoc(kind) or "").split())


def group_defaults(arguments: list[Argument]) -> dict[str, dict]:
    """Fields of the instance that is a group's default: `validation` of `train` is not as its class has it."""
    found = {}
    for argument in arguments:
        default = argument.field_info.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            found[argument.name.lstrip("-").replace("-", "_")] = dataclasses.asdict(default)
    return found


def row(argument: Argument, defaults: dict) -> str:
    """A line of the table."""
    field = argument.name.rpartition(".")[2].replace("-", "_")
    default = defaults.get(field, argument.field_info.default)
    if default is argument.field_info.empty:
        needed = "**needed**" if argument.required else "**needed** with the others"
        said = needed if argument.field_info.required else ""
    else:
        said = "" if default is None or default == [] else f"`{plain(default)}`"
    meaning = " ".join((argument.parameter.help or "").split())
    cells = [f"`{argument.name}`", kind_of(argument.hint), said, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plain(value) -> str:
    """A default as one would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def kind_of(hint) -> str:
    """A type in words; the choices, where there are some."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return kind_of(next(argument for argument in arguments if argument is not type(None)))
    if origin is dict:
        return "`NAME VALUE`"
    if origin in (list, tuple):
        return f"{kind_of(arguments[0])} …"
    names = {bool: "yes or no", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


# ── All of it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def refreshed() -> dict[Path, str]:
    """What each file should hold."""
    found = {IMAGES / f"{name}.svg": draw().svg() for name, draw in DRAWINGS.items()}
    found |= {DOCS / "options.md": options_page(), DOCS / "api.md": api_page()}
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        if page not in found:
            found[page] = refresh_lines(page.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    for file, text in refreshed().items():
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(file.relative_to(ROOT))
