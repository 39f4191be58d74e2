"""From a prompt to the text that an export continues it with."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmexport.export import manifest
from llmexport.export.exported import Export
from llmexport.export.folder import folder_path
from llmexport.export.progress import Progress, silent
from llmexport.run import chat, text
from llmexport.run.errors import RunError
from llmexport.run.sampling import Sampler
from llmexport.run.session import check_decoder, check_prompt, decode, opened, positions, row, run_again_at
from llmexport.run.settings import read_settings

MOST_TOKENS = 256


@dataclass(frozen=True)
class Answer:
    """What came of a prompt.

    prompt: as the model got it, with the chat template's words; None if ids were given. text: None without a tokenizer.
    finish: "stop" at a token or text that ends it, "length" after as many tokens as were asked for, "context" where the
    model has no more positions. seconds: until the model was loaded, from then to the first token, and to the last.
    """

    prompt: str | None
    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    finish: str
    seed: int
    seconds: dict[str, float]
    notes: tuple[str, ...]


def generate(
    folder: str | os.PathLike[str],
    prompt: str | Sequence[int],
    *,
    use_chat: bool | None = None,
    max_new_tokens: int = MOST_TOKENS,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    backend: str = "onnxruntime",
    show: Callable[[str], object] = str,
    progress: Progress = silent,
) -> Answer:
    """Continues `prompt`, a text or the ids of its tokens, by the export in `folder`; nothing is written.

    use_chat: whether the prompt is what a user says in the checkpoint's chat template; None: if there is one. The other
    arguments are the options of `llmexport generate`; what none of them says, generation_config.json does. show: is
    given the text piece by piece. Raises UserError (llmexport.plugins.errors), with one line that says what to do.
    """
    if max_new_tokens < 1:
        raise RunError(f"max_new_tokens is {max_new_tokens}: make it 1 or more")
    export = manifest.read(folder_path(folder))
    check_decoder(export)
    if "" in stop:
        raise RunError("a text to stop at is empty: give some text, or no --stop")
    settings = read_settings(export, temperature=temperature, top_k=top_k, top_p=top_p)
    tokenizer, said, ids = _tokens(export, prompt, use_chat)
    if stop and not tokenizer:
        raise RunError(f"a text to stop at takes a tokenizer, and {export.folder} has no {text.FILE}: leave --stop out")
    check_prompt(export, ids)
    seed = secrets.randbits(32) if seed is None else seed
    progress("load the model", 0, 1)
    start = time.perf_counter()
    stream = text.Stream(tokenizer, (*settings.stop, *stop)) if tokenizer else None
    # The last token needs no position.
    most = positions(export) or len(ids) + max_new_tokens
    room = most - len(ids) + 1
    made, finish, first = list[int](), "length" if max_new_tokens <= room else "context", 0.0
    with opened(export, backend) as session:
        export.check_untouched()
        progress("load the model", 1, 1)
        loaded = time.perf_counter()
        for [token] in decode(session, row(ids), Sampler(settings.sampling, seed), run_again_at(export)):
            first = first or time.perf_counter()
            made.append(int(token))
            if made[-1] in settings.eos:
                finish = "stop"
                break
            show(stream.put(made[-1]) if stream else f"{made[-1]} ")
            if stream and stream.stopped:
                finish = "stop"
                break
            if len(made) == min(max_new_tokens, room):
                break
    if stream:
        show(stream.end())
    seconds = {"load": loaded - start, "first": first - loaded, "rest": time.perf_counter() - first}
    ended = (f"the text ends where the model has no more room: it takes {most} tokens",) if finish == "context" else ()
    notes = (*settings.notes, *ended)
    return Answer(said, ids, made, stream.text if stream else None, finish, seed, seconds, notes)


def _tokens(
    export: Export, prompt: str | Sequence[int], use_chat: bool | None
) -> tuple[text.Tokenizer | None, str | None, list[int]]:
    """The tokenizer of an export, the text of a prompt as the model gets it, and its tokens."""
    folder = export.folder
    if not isinstance(prompt, str):
        if use_chat:
            raise RunError("a chat template takes text, and ids are given: give a text, or no --chat")
        return (text.read_tokenizer(folder) if (folder / text.FILE).exists() else None), None, list(prompt)
    tokenizer = text.read_tokenizer(folder)
    template = None if use_chat is False else chat.read_template(folder)
    if template is None:
        if use_chat:
            raise RunError(f"{folder} has no chat template, neither {chat.TEMPLATE} nor in {chat.CONFIG}: pass --raw")
        return tokenizer, prompt, text.encode(tokenizer, prompt, special=True)
    messages = [{"role": "user", "content": prompt}]
    said = chat.render(template, messages, chat.special_tokens(folder))
    return tokenizer, said, text.encode(tokenizer, said, special=False)
