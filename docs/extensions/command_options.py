"""The directive `command-options`: what `padim-ray COMMAND --help` says, as a part of a page."""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from cyclopts import App
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from padim_ray import cli


class CommandOptions(SphinxDirective):
    """The arguments and options of the command that is named, in the groups of its help text."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Definition lists, each after its group's name."""
        app = App(result_action="return_value")
        app.default(getattr(cli, self.arguments[0]))
        arguments = app.assemble_argument_collection(parse_docstring=True)
        shown = sorted((each for each in arguments if each.show), key=_order)
        result: list[nodes.Node] = []
        for group, members in groupby(shown, _group):
            result.append(nodes.rubric(text=group))
            result.append(nodes.definition_list("", *(_definition(each) for each in members)))
        return result


def _order(argument: Any) -> tuple[int, str, bool]:
    """The groups of the help text, required options first."""
    key = argument.parameter.group[0].sort_key
    return (key if isinstance(key, int) else 0, _group(argument), not argument.required)


def _group(argument: Any) -> str:
    return argument.parameter.group[0].name


def _definition(argument: Any) -> nodes.definition_list_item:
    term = nodes.term("", "", nodes.literal(text=argument.name))
    choices = argument.get_choices() or ()
    if len(choices) > 1:  # a single one stands beside a number
        term += nodes.Text(f" {' | '.join(choices)}")
    if argument.required:
        term += nodes.Text(" (required)")
    elif default := _default(argument):
        term += nodes.Text(" (default: ")
        term += nodes.literal(text=default)
        term += nodes.Text(")")
    text = " ".join((argument.parameter.help or "").split())
    paragraph = nodes.paragraph("", "", *_inline(text))
    return nodes.definition_list_item("", term, nodes.definition("", paragraph))


def _default(argument: Any) -> str:
    """The default as the help text shows it, or nothing where the text itself says it."""
    value, show = argument.field_info.default, argument.parameter.show_default
    if show is False or value in (None, False) or value is argument.field_info.empty:
        return ""
    return show(value) if callable(show) else str(value)


def _inline(text: str) -> Iterator[nodes.Node]:
    """Text in which `backticks` mean code."""
    for index, part in enumerate(re.split("`([^`]+)`", text)):
        yield nodes.literal(text=part) if index % 2 else nodes.Text(part)


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-options", CommandOptions)
    return {"parallel_read_safe": True}
