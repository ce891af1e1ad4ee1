"""A conversation as text, by the chat template of a model, rendered as transformers' `apply_chat_template` does.

Templates are code of strangers: they run in jinja2's sandbox, which sees strings and numbers only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["render_chat"]


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation.

    Args:
        template: The chat template.
        messages: Each with `role` and `content`.
        special_tokens: The special tokens by name ("bos_token"), which templates may write.
        add_generation_prompt: End with the beginning of the assistant's turn.

    Raises:
        jinja2.TemplateError: The template is no template, refuses the messages, or leaves the sandbox.
    """
    variables: dict[str, Any] = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
    return _compile(template).render(**variables, add_generation_prompt=add_generation_prompt, **special_tokens)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training. Here it stays as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration is of an instance

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call, as in transformers: what is set inside is not seen outside.
        return nodes.CallBlock(self.call_method("_keep"), [], [], body).set_lineno(line)

    def _keep(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` of templates: the two ways to make one, and nothing to get out of the sandbox by."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` of templates, without private names."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        everything = dict(*args, **values)
        for name in everything:
            _refuse_private(name)
        super().__init__(everything)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot have the private name {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own is for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(template)
