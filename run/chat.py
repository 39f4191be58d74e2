"""A checkpoint's chat template, rendered as transformers renders it (chat_template_utils.py), in a sandbox."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmexport.export.values import visible
from llmexport.run.companions import read_json, read_text
from llmexport.run.errors import RunError

TEMPLATE, CONFIG, MAP = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
DEFAULT = "default"  # of several templates


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training: its text stands as it is."""

    tags = {"generation"}  # noqa: RUF012  jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_template(folder: Path) -> str | None:
    """The chat template of an export, None if it has none."""
    if (own := read_text(folder / TEMPLATE)) is not None:
        return own
    said = read_json(folder / CONFIG).get("chat_template")
    if said is None or isinstance(said, str):
        return said
    try:
        named = {entry["name"]: entry["template"] for entry in said}
    except (TypeError, KeyError) as error:
        raise RunError(f"{folder / CONFIG} has a chat_template that is neither text nor a list: pass --raw") from error
    if DEFAULT not in named:
        names = ", ".join(map(visible, map(str, named)))
        raise RunError(f"{folder / CONFIG} has the chat templates {names}, and none that is the default: pass --raw")
    return str(named[DEFAULT])


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token and their like, which templates read."""
    found = {}
    for name, value in (read_json(folder / MAP) | read_json(folder / CONFIG)).items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def render(template: str, messages: list[dict[str, Any]], special: dict[str, str]) -> str:
    """The text of a chat, up to where the model goes on. Raises RunError if the template refuses it or fails."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda f: datetime.datetime.now().strftime(f)}
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
        )
    except Exception as error:  # whatever a template does wrong is no fault of ours
        raise RunError(f"the chat template does not take this prompt ({error}): pass --raw to do without it") from error


def _tojson(
    data: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own escapes HTML.
    return json.dumps(data, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
