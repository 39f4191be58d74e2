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
from llmexport.run import MOST_TOKENS, chat, text
from llmexport.run.checks import check_decoder, check_patches, check_prompt, picture_tokens, positions, run_again_at
from llmexport.run.errors import RunError
from llmexport.run.pictures import Asked, check_installed, check_sees, process, read_pictures
from llmexport.run.prompts import begun, row
from llmexport.run.sampling import Sampler
from llmexport.run.session import decode, opened
from llmexport.run.settings import read_settings
from llmexport.validate.pictures import Pictures, sight


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
    images: Sequence[str | os.PathLike[str]] = (),
    videos: Sequence[str | os.PathLike[str]] = (),
    backend: str = "onnxruntime",
    show: Callable[[str], object] = str,
    progress: Progress = silent,
) -> Answer:
    """Continues `prompt`, a text or the ids of its tokens, by the export in `folder`; nothing is written.

    use_chat: whether the prompt is what a user says in the checkpoint's chat template; None: if there is one. images,
    files, and videos, folders of frames, come before it in a chat; elsewhere its placeholders say where. They take what
    the extra `vision` installs. The other arguments are the options of `llmexport generate`; what none of them says,
    generation_config.json does. show: is given the text piece by piece. Raises UserError (llmexport.plugins.errors),
    with one line that says what to do.
    """
    if max_new_tokens < 1:
        raise RunError(f"max_new_tokens is {max_new_tokens}: make it 1 or more")
    export = manifest.read(folder_path(folder))
    check_decoder(export)
    if "" in stop:
        raise RunError("a text to stop at is empty: give some text, or no --stop")
    settings = read_settings(export, temperature=temperature, top_k=top_k, top_p=top_p)
    asked = _asked(export, prompt, images, videos)
    tokenizer, said, ids, pictures = _tokens(export, prompt, use_chat, asked)
    if stop and not tokenizer:
        raise RunError(f"a text to stop at takes a tokenizer, and {export.folder} has no {text.FILE}: leave --stop out")
    check_prompt(export, ids, pictures)
    if pictures is not None and backend == "onnxruntime":
        check_patches(export, pictures)
    seed = secrets.randbits(32) if seed is None else seed
    progress("load the model", 0, 1)
    start = time.perf_counter()
    stream = text.Stream(tokenizer, (*settings.stop, *stop)) if tokenizer else None
    # The last token needs no position.
    most = positions(export) or len(ids) + max_new_tokens
    room = most - len(ids) + 1
    made, finish, first = list[int](), "length" if max_new_tokens <= room else "context", 0.0
    begins, begin = begun(export, row(ids), pictures, sight(export.blocks))
    with opened(export, backend) as session:
        export.check_untouched()
        progress("load the model", 1, 1)
        loaded = time.perf_counter()
        tokens, never = Sampler(settings.sampling, seed), picture_tokens(export)
        for [token] in decode(session, begins, tokens, run_again_at(export), begin=begin, never=never):
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


def _asked(
    export: Export,
    prompt: str | Sequence[int],
    images: Sequence[str | os.PathLike[str]],
    videos: Sequence[str | os.PathLike[str]],
) -> Asked | None:
    """The pictures that a prompt is given with, read."""
    if not images and not videos:
        return None
    if not isinstance(prompt, str):
        raise RunError("pictures stand between words of a text, and ids are given: give a text")
    check_sees(export)
    check_installed()
    return read_pictures(images, videos)


def _tokens(
    export: Export, prompt: str | Sequence[int], use_chat: bool | None, asked: Asked | None
) -> tuple[text.Tokenizer | None, str | None, list[int], Pictures | None]:
    """The tokenizer of an export, the text of a prompt as the model gets it, its tokens, and its pictures."""
    folder = export.folder
    if not isinstance(prompt, str):
        if use_chat:
            raise RunError("a chat template takes text, and ids are given: give a text, or no --chat")
        known = text.read_tokenizer(folder) if (folder / text.FILE).exists() else None
        return known, None, list(prompt), None
    tokenizer = text.read_tokenizer(folder)
    template = None if use_chat is False else chat.read_template(folder)
    if template is None:
        if use_chat:
            raise RunError(f"{folder} has no chat template, neither {chat.TEMPLATE} nor in {chat.CONFIG}: pass --raw")
        said = prompt
    else:
        content = [*asked.parts, {"type": "text", "text": prompt}] if asked else prompt
        said = chat.render(template, [{"role": "user", "content": content}], chat.special_tokens(folder))
    if asked:
        return tokenizer, said, *process(export, said, asked, special=template is None)
    return tokenizer, said, text.encode(tokenizer, said, special=template is None), None
