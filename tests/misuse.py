"""Tries situations of misuse: what must hold in each, and how many do. `python tests/misuse.py [KIND ...]` prints it.

Held means: the exit code that is expected; for 2 one line on stderr, which begins with `error: `, and the same as
JSON on stdout where --json asks for it; no traceback; every file that was there is as it was; nothing of ours left.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

SECONDS = 120  # until a situation counts as a hang
COMMAND = f"{sys.executable} -m llmexport.export.cli.main"
REPORTS = {"report.json", "report.html"}


@dataclass(frozen=True)
class Situation:
    """One misuse, in a folder with a checkpoint `ck`, its export `out`, its blocks `blocks`, and what `prepare` does.

    It runs in this process with `arguments`, --json and -q, or as a `shell` line, in which $L is the command.
    With code 0 new files may appear, but for ours that are hidden.
    """

    kind: str
    name: str
    arguments: tuple[str, ...] = ()
    prepare: Callable[[Path], object] = lambda folder: None
    code: int = 2
    shell: str = ""
    says: str = ""  # words of the error
    silent: bool = False  # stderr is not there, or there is nothing to say
    either: bool = False  # 0 is right as well
    environment: dict[str, str] = field(default_factory=dict)
    changes: frozenset[str] = frozenset()  # files that may be other ones afterwards


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


class Hang(BaseException):
    """A situation that does not end."""


def make_base(folder: Path) -> None:
    """What every situation begins with."""
    for arguments in (
        ("checkpoint", "--arch", "gemma", "-o", "ck"),
        ("onnx", "--checkpoint", "ck", "-o", "out"),
        ("onnx", "--checkpoint", "ck", "--block", "all", "-o", "blocks"),
        ("onnx", "--checkpoint", "ck", "--block", "embedding", "-o", "small"),
    ):
        with inside(folder):
            # The first traces.
            ended = call((*arguments, "-q"), 10 * SECONDS)
        assert ended.code == 0, ended.err


def problem(situation: Situation, base: Path, scratch: Path) -> str:
    """What does not hold in a situation; nothing if all does."""
    folder = Path(tempfile.mkdtemp(dir=scratch)) / "home"
    shutil.copytree(base, folder, symlinks=True)
    for path in (scratch, folder.parent, folder):
        path.chmod(0o755)
    situation.prepare(folder)
    before = contents(folder)
    with inside(folder):
        ended = run_shell(situation) if situation.shell else call((*situation.arguments, "--json", "-q"))
    after = contents(folder)
    return "; ".join(_wrong(situation, ended, before, after))


def _wrong(situation: Situation, ended: Ended, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    said = ended.err.removesuffix("\n")
    code = 0 if situation.either and ended.code == 0 else situation.code
    if ended.code != code:
        yield f"exit code {ended.code}, not {code}"
    if "Traceback" in ended.out + ended.err or "Exception ignored" in ended.err:
        yield "a traceback"
    lines = [line for line in said.split("\n") if not line.startswith("  ")]
    if code == 2 and not situation.silent and not (len(lines) == 1 and said.startswith("error: ")):
        yield f"{len(lines)} lines on stderr"
    if situation.says not in ended.err:
        yield f"no word of {situation.says!r}"
    if code == 2 and (not situation.shell or "--json" in situation.shell) and not situation.silent:
        try:
            if json.loads(ended.out, parse_constant=_refuse) != {"error": said.removeprefix("error: ")}:
                yield "another error in JSON"
        except ValueError:
            yield "no JSON"
    if changed := sorted(n for n in before if after.get(n) != before[n] and n not in situation.changes):
        yield f"changed {', '.join(changed[:3])}"
    new = after.keys() - before.keys()
    if left := sorted(n for n in new if code or ".llmexport-" in n):
        yield f"left {', '.join(left[:3])}"


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def call(arguments: tuple[str, ...], seconds: int = SECONDS) -> Ended:
    """A command in this process."""
    from llmexport.export.cli.main import main

    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    saved = sys.argv, sys.stdout, sys.stderr
    handler = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    sys.argv, sys.stdout, sys.stderr = ["llmexport", *arguments], *streams
    code, crash = 0, ""
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException as error:
        code, crash = 1, f"Traceback: {error!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        sys.argv, sys.stdout, sys.stderr = saved
    out, err = (s.buffer.getvalue().decode() for s in streams)
    return Ended(code, out, err + crash)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def run_shell(situation: Situation) -> Ended:
    """A line of bash; the environment is this one's, with a signal that is ignored here not ignored there."""
    shell = subprocess.Popen(
        ["bash", "-c", situation.shell],
        env=os.environ | {"L": COMMAND} | situation.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="backslashreplace",
        preexec_fn=heed_signals,
        start_new_session=True,
    )
    try:
        out, err = shell.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGKILL)
        out, err = shell.communicate()
        return Ended(-1, out, err)
    return Ended(shell.returncode, out, err)


def heed_signals() -> None:
    """For a new process: it is asked to end as one in a terminal is, even where this one was started by nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def contents(folder: Path) -> dict[str, str]:
    """All that is in a folder, by name: kind, permissions, and what is in it."""
    found = {}
    for path in folder.rglob("*"):
        info = path.lstat()
        data = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        held = hashlib.sha256(data if isinstance(data, bytes) else os.fsencode(data)).hexdigest()
        found[str(path.relative_to(folder))] = f"{info.st_mode:o} {held}"
    return found


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(kinds: list[str]) -> None:
    from misuse_cases import SITUATIONS

    with tempfile.TemporaryDirectory(prefix="misuse-") as name:
        base, held, start = Path(name) / "base", 0, time.monotonic()
        base.mkdir()
        make_base(base)
        chosen = [s for s in SITUATIONS if not kinds or s.kind in kinds]
        for situation in chosen:
            wrong = problem(situation, base, Path(name))
            held += not wrong
            if wrong:
                print(f"{situation.kind}: {situation.name}: {wrong}", flush=True)
    print(f"situations tried: {len(chosen)}, held: {held}, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
