"""Chat templates, against transformers' own rendering of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tiny_tokenizer import BEGIN, TEMPLATE, add_tokenizer

from llmexport.run.chat import read_template, render, special_tokens
from llmexport.run.errors import RunError

MESSAGES = [{"role": "user", "content": "say <b> & 'fox'"}]
TEMPLATES = {
    "plain": TEMPLATE,
    "whitespace": "  {% for m in messages %}\n    {% if true %}\n  {{ m.content }}\n {% endif %}\n{% endfor %}\n",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': 1} | tojson(sort_keys=true) }}",
    "loops": "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ tools is none }}|{{ documents is none }}",
    "undefined": "{% if enable_thinking is defined %}a{% else %}b{% endif %}",
    "generation": "x{% generation %}\n  {{ messages[0].content }}\n{% endgeneration %}y",
    "date": "{{ strftime_now('%Y')|length }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_gives_what_transformers_gives(template: str, tmp_path: Path) -> None:
    add_tokenizer(tmp_path, chat_template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render(read_template(tmp_path) or "", MESSAGES, special_tokens(tmp_path)) == expected


def test_the_file_of_the_template_counts_more_than_the_config(tmp_path: Path) -> None:
    add_tokenizer(tmp_path)
    assert read_template(tmp_path) == TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_template(tmp_path) == "file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    add_tokenizer(tmp_path, chat_template=named)
    assert read_template(tmp_path) == "d"
    add_tokenizer(tmp_path, chat_template=named[:1])
    with pytest.raises(RunError, match="has the chat templates tool_use, and none that is the default: pass --raw"):
        read_template(tmp_path)


def test_without_a_template_there_is_none(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    assert special_tokens(tmp_path) == {}


def test_special_tokens_are_read_from_the_older_map_too(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": BEGIN}, "n_token": 1}))
    assert special_tokens(tmp_path) == {"bos_token": BEGIN}


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, says: str) -> None:
    with pytest.raises(RunError, match=f"does not take this prompt .*({says})"):
        render(template, MESSAGES, {})


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tokenizer_config.json", b"{", "is no JSON"),
        ("tokenizer_config.json", b"[]", "holds no JSON object"),
        ("tokenizer_config.json", b'{"chat_template": [1]}', "neither text nor a list"),
        ("chat_template.jinja", b"\xff", "is no text in UTF-8"),
    ],
)
def test_a_damaged_file_is_one_line(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RunError, match=says):
        read_template(tmp_path)
