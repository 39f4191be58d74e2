"""The situations of misuse, by kind; a new one is a line. `misuse.py` says what must hold in them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from misuse import Situation
from toy_pack import make_pack

from llmexport.export import archs, random_checkpoint

Prepare = Callable[[Path], object]
DEEP = b"[" * 100_000
OTHER = "setpriv --reuid 12345 --clear-groups"
DEPLOY = "deploy --arch gemma -o new --weights copy -q"
SHARD = "model-00001-of-00001.safetensors"


def write(name: str, data: bytes = b"mine") -> Prepare:
    """Puts a file where there may be another one or none."""

    def prepare(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return prepare


def remove(name: str) -> Prepare:
    def prepare(folder: Path) -> None:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return prepare


def make_folder(name: str) -> Prepare:
    return both(remove(name), lambda folder: (folder / name).mkdir(parents=True))


def link(name: str, to: str) -> Prepare:
    return both(remove(name), lambda folder: (folder / name).symlink_to(to))


def both(*steps: Prepare) -> Prepare:
    return lambda folder: [step(folder) for step in steps]


def cut(name: str) -> Prepare:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


# What can be in the place of a file, by name.
DAMAGES: dict[str, Callable[[str], Prepare]] = {
    "missing": remove,
    "a folder": make_folder,
    "empty": lambda name: write(name, b""),
    "bytes": lambda name: write(name, bytes(range(256))),
    "cut": cut,
    "a link to itself": lambda name: link(name, Path(name).name),
    "a link to nothing": lambda name: link(name, "nowhere"),
}
JSON_DAMAGES: dict[str, Callable[[str], Prepare]] = DAMAGES | {
    "a list": lambda name: write(name, b"[]"),
    "an empty object": lambda name: write(name, b"{}"),
    "null": lambda name: write(name, b"null"),
    "deep": lambda name: write(name, DEEP),
}


def force() -> Iterator[Situation]:
    export = ("onnx", "--checkpoint", "ck", "--force", "-o")
    app = b'{"name": "app", "icons": [], "start_url": "."}'
    foreign: dict[str, Prepare] = {
        "a web app": both(write("x/manifest.json", app), write("x/index.html")),
        "a web app with a format": both(write("x/manifest.json", b'{"format": 1, "files": ["a"]}'), write("x/a")),
        "a repository": both(write("x/manifest.json", app), write("x/.git/HEAD")),
        "a folder manifest.json": both(make_folder("x/manifest.json"), write("x/thesis")),
        "an empty manifest.json": both(write("x/manifest.json", b""), write("x/thesis")),
        "a list for a manifest": both(write("x/manifest.json", b"[1]"), write("x/thesis")),
        "a deep manifest": both(write("x/manifest.json", DEEP), write("x/thesis")),
        "no manifest": write("x/thesis"),
        "a link to itself for a manifest": both(write("x/thesis"), link("x/manifest.json", "manifest.json")),
    }
    for name, prepare in foreign.items():
        yield Situation("force", f"onnx onto {name}", (*export, "x"), prepare, says="--force does not replace")
    yield Situation(
        "force", "deploy onto a web app", ("deploy", "--arch", "gemma", "--force", "-o", "x"), foreign["a web app"]
    )
    for record, data in (
        ("blocks.json", b'{"blocks": ["a"]}'),
        ("blocks.json", b'{"blocks": 5}'),
        ("blocks.json", app),
    ):
        prepare = both(write(f"x/{record}", data), write("x/a/thesis"))
        yield Situation("force", f"blocks onto {data[:15]!r}", (*export, "x", "--block", "all"), prepare)
    yield Situation("force", "blocks onto a folder", (*export, "x", "--block", "all"), make_folder("x/blocks.json"))
    for data in (b"", b"{}", b"[]", b'{"seed": "mine"}', app):
        prepare = both(write("x/llmexport-random.json", data), write("x/model.safetensors"))
        random = ("checkpoint", "--arch", "gemma", "--force", "-o", "x")
        yield Situation("force", f"checkpoint onto {data[:15]!r}", random, prepare)
    additions = ("notes.txt", "sub/notes.txt", ".hidden", ".git/HEAD", "golden.npz", "model.onnx.bak", "model.plan/x")
    for name in additions:
        yield Situation(
            "force", f"onnx onto an export with {name}", (*export, "out"), write(f"out/{name}"), says=name.split("/")[0]
        )
    yield Situation("force", "onnx onto an export with a folder", (*export, "out"), make_folder("out/mine"))
    yield Situation("force", "onnx onto an export with a link", (*export, "out"), link("out/mine", "/etc/hostname"))
    for name in ("notes.txt", "attention/notes.txt", "mine/notes.txt"):
        place = (*export, "blocks", "--block", "all")
        yield Situation(
            "force",
            f"blocks onto blocks with {name}",
            place,
            write(f"blocks/{name}"),
            says="notes.txt" if "/n" not in name else "",
        )
    onto = ("checkpoint", "--arch", "gemma", "--force", "-o", "ck")
    yield Situation("force", "checkpoint onto one with notes", onto, write("ck/notes.txt"), says="notes.txt")
    yield Situation("force", "checkpoint onto a download", onto, remove("ck/llmexport-random.json"))
    yield Situation("force", "checkpoint onto an export", (*onto[:-1], "out"))
    yield Situation("force", "onnx onto its checkpoint", (*export, "ck"))
    yield Situation("force", "onnx onto a random checkpoint", ("onnx", "--arch", "gemma", "--force", "-o", "ck"))
    yield Situation("force", "onnx onto the current folder", (*export, "."))
    yield Situation("force", "onnx onto the folder above", (*export, ".."))
    yield Situation("force", "onnx onto /", (*export, "/"))
    everything = frozenset(
        {"out", "out/manifest.json", "out/model.onnx", f"out/{SHARD}", "out/model.plan", "out/report.json"}
    )
    prepare = both(write("out/model.plan"), write("out/report.json"))
    yield Situation(
        "force", "onnx onto an export with an engine", (*export, "out"), prepare, code=0, changes=everything
    )
    for command in (
        ("onnx", "--checkpoint", "ck"),
        ("onnx", "--arch", "gemma"),
        ("checkpoint", "--arch", "gemma"),
        ("deploy", "--arch", "gemma"),
    ):
        yield Situation(
            "force", f"{' '.join(command)} onto an export without --force", (*command, "-o", "out"), says="--force"
        )


def outputs() -> Iterator[Situation]:
    places: dict[str, tuple[str, Prepare]] = {
        "no name": ("", lambda folder: None),
        "no such parent": ("no/out2", lambda folder: None),
        "a file for a parent": ("mine/out2", write("mine")),
        "a parent that is not there and back": ("new4/../new5", lambda folder: None),
        "in /proc": ("/proc/x", lambda folder: None),
        "in /sys": ("/sys/x", lambda folder: None),
        "a device": ("/dev/null", lambda folder: None),
        "in a device": ("/dev/null/x", lambda folder: None),
        "a link to itself": ("loop", link("loop", "loop")),
        "in a link to itself": ("loop/out2", link("loop", "loop")),
        "a link to nowhere": ("dangling", link("dangling", "no/such")),
        "a file": ("mine", write("mine")),
        "in a file of an export": ("out/model.onnx/x", lambda folder: None),
        "a long name": ("x" * 300, lambda folder: None),
        "a long path": ("x/" * 3000, lambda folder: None),
        "two lines": ("no\nerror: forged/out", lambda folder: None),
        "an escape": ("no\x1b[31m/out", lambda folder: None),
        "no text": ("no\udcff/out", lambda folder: None),
        "a pipe": ("pipe", lambda folder: os.mkfifo(folder / "pipe")),
    }
    commands = {
        "onnx": ("onnx", "--checkpoint", "ck", "--force"),
        "onnx --arch": ("onnx", "--arch", "gemma"),
        "checkpoint": ("checkpoint", "--arch", "gemma"),
    }
    for command, arguments in commands.items():
        for name, (place, prepare) in places.items():
            yield Situation("outputs", f"{command} to {name}", (*arguments, "-o", place), prepare)


def checkpoints() -> Iterator[Situation]:
    export = ("onnx", "-o", "new", "--checkpoint")
    for name in ("nowhere", "out/model.onnx", "/dev/null", "", "loop", "loop/ck", "no\nerror: forged"):
        yield Situation("checkpoints", f"--checkpoint {name!r}", (*export, name), link("loop", "loop"))
    files = {"config.json": JSON_DAMAGES, "model.safetensors.index.json": JSON_DAMAGES, SHARD: DAMAGES}
    for file, damages in files.items():
        for name, damage in damages.items():
            yield Situation("checkpoints", f"{file} is {name}", (*export, "ck"), damage(f"ck/{file}"))
    make = ("checkpoint", "-o", "new", "--config", "config.json")
    for name, damage in JSON_DAMAGES.items():
        prepare = both(lambda folder: shutil.copy(folder / "ck/config.json", folder), damage("config.json"))
        yield Situation("checkpoints", f"--config is {name}", make, prepare)
    yield Situation("checkpoints", "--config has no name", (*make[:-1], ""))


def exports() -> Iterator[Situation]:
    files = {"manifest.json": JSON_DAMAGES, "model.onnx": DAMAGES, SHARD: DAMAGES}
    for command in ("engine", "validate"):
        for name in ("nowhere", "ck", "ck/config.json", "/dev/null", "", "loop", "blocks", "no\nerror: forged"):
            yield Situation("exports", f"{command} of {name!r}", (command, name), link("loop", "loop"))
        for file, damages in files.items():
            for name, damage in damages.items():
                yield Situation("exports", f"{command}, {file} is {name}", (command, "small"), damage(f"small/{file}"))
        foreign = lambda folder: shutil.copy(folder / "blocks/head/model.onnx", folder / "small/model.onnx")  # noqa: E731
        yield Situation("exports", f"{command}, model.onnx is of another", (command, "small"), foreign)


def packs() -> Iterator[Situation]:
    """Golden packs: in place of one, of another model, and where one cannot be written."""

    def another(folder: Path) -> None:
        make_pack(folder / "p.npz")

    replay = ("validate", "out", "--golden", "p.npz")
    for name, damage in DAMAGES.items():
        yield Situation("packs", f"a pack is {name}", replay, both(another, damage("p.npz")))
    yield Situation("packs", "a pack of another model", replay, another, says="is of another model")
    engine = ("validate", "--engine", "out", "--golden", "p.npz")
    yield Situation("packs", "no engine", engine, another, says="holds no engine")
    damaged = both(another, write("out/engine.json", b"{}"))
    yield Situation("packs", "a damaged engine", engine, damaged, says="is damaged or of another version")
    for name in ("out", "nowhere/p.npz", "ck/config.json/p.npz", "", "/dev/null", "ck/config.json"):
        yield Situation("packs", f"a pack as {name!r}", ("golden", "out", "-o", name))
        yield Situation("packs", f"a pack as {name!r} with --force", ("golden", "out", "-o", name, "--force"))
    yield Situation("packs", "of what is no export", ("golden", "ck", "-o", "p.npz"))
    yield Situation("packs", "of one block", ("golden", "small", "-o", "p.npz"), says="is one block")
    for name in ("out", "nowhere/r.json", "", "/dev/null", "ck/config.json"):
        yield Situation("packs", f"results as {name!r}", ("validate", "out", "--save-results", name))


# Wrong lines; EXPORT is one that would be right.
EXPORT = "onnx --checkpoint ck -o new"
WRONG = f"""
nosuch
--nosuch
onnx
onnx -o
onnx --checkpoint ck
onnx -o new --arch ../archs
onnx -o new --arch gema
{EXPORT} more
{EXPORT} --nosuch
{EXPORT} --dtype int8
{EXPORT} --weights move
{EXPORT} --target x
{EXPORT} --block ''
{EXPORT} --block nosuch
{EXPORT} --arch ''
checkpoint -o new
checkpoint --arch gemma -o new --seed -1
checkpoint --arch gemma -o new --seed x
plugins nosuch
plugins build --jobs 0
plugins build --archs ''
plugins build --archs x
plugins build --archs 80,,90
validate
validate out more
validate out --seed -1
validate out --tokens 1
validate out --tokens 1e9
validate out --tokens 999999999999999999999999
validate --engine out
validate out --engine out --golden p.npz
validate out --golden p.npz --seed 1
golden out
golden -o p.npz
golden out -o p.npz --tokens 1
archs more
ops more
doctor --fix
engine
engine out --backend x
engine out --weights copy
engine out --weights beside --profile model.norm.weight=1
deploy
deploy --arch gemma -o ''
"""


def usage() -> Iterator[Situation]:
    for line in WRONG.strip().splitlines():
        yield Situation("usage", line, tuple(shlex.split(line)))
    for line in ("nosuch", "--nosuch", "onnx", f"{EXPORT} --dtype int8", "plugins nosuch", "validate out --tokens 1e9"):
        yield Situation("usage", f"{line}, for people", shell=f"$L {line}")
    for option in ("--block", "--arch"):
        yield Situation("usage", f"two lines for {option}", (*EXPORT.split(), option, "a\nerror: b"))
    for seconds in ("inf", "-inf", "nan", "1e308", "0", "-1", "x", ""):
        yield Situation("usage", f"--timeout {seconds}", ("engine", "small", "--timeout", seconds))
    for profile in (
        "", "batch", "batch=0", "batch=2:1:1", "batch=x", "rows=1", "batch=99999999999", "batch=1,batch=1", "total=1",
        "past=0:1:2147483647,sequence=1:1:2147483647", "batch=2147483648",
    ):  # fmt: skip
        yield Situation("usage", f"--profile {profile}", ("engine", "out", "--profile", profile))
    many = "ulimit -v 8000000; $L validate out --tokens 1000000000 --json -q"
    yield Situation("usage", "--tokens 1000000000", shell=many)


def streams() -> Iterator[Situation]:
    for command in ("archs", "onnx --checkpoint ck -o new"):
        one = command.split()[0]
        done = "; c=$?; tail -1 err >&2; rm -rf new err; exit $c"
        yield Situation("streams", f"{one} >&-", shell=f"$L {command} >&-", says="stdout is closed")
        yield Situation(
            "streams",
            f"{one} --json >&-",
            shell=f"$L {command.replace(' ', ' --json ', 1)} >&- || exit $?",
            silent=True,
        )
        yield Situation("streams", f"{one} -q >&-", shell=f"$L {command} -q >&-", code=0)
        yield Situation(
            "streams", f"{one} >/dev/full", shell=f"$L {command} 2>err >/dev/full{done}", says="stdout: No space left"
        )
        yield Situation(
            "streams",
            f"{one} --json >/dev/full",
            shell=f"$L {command} --json 2>err >/dev/full{done}",
            silent=True,
            says="stdout: No space left",
        )
        yield Situation(
            "streams", f"{one} | true", shell=f"set -o pipefail; $L {command} 2>err | true{done}", says="Broken pipe"
        )
        yield Situation("streams", f"{one} 2>&-", shell=f"$L {command} 2>&- >/dev/null", code=0, silent=True)
        yield Situation(
            "streams", f"{one} 2>/dev/full", shell=f"$L {command} 2>/dev/full >/dev/null", code=0, silent=True
        )
        yield Situation(
            "streams", f"{one} with nothing open", shell=f"$L {command} -q <&- >&- 2>&-", code=0, silent=True
        )
    for rest in ("", " --json"):
        for to in (">&-", "2>&-", ">/dev/full", "2>/dev/full", "<&-", ">/dev/full 2>/dev/full"):
            line = f"$L validate nowhere{rest} {to}"
            yield Situation("streams", line, shell=line, silent="2>" in to or bool(rest and "<" not in to))
    yield Situation("streams", "help | true", shell="set -o pipefail; $L onnx --help | true", says="Broken pipe")
    yield Situation("streams", "help >/dev/full", shell="$L onnx --help >/dev/full", says="No space left")
    for shown in ("PYTHONIOENCODING=ascii", "LC_ALL=C PYTHONUTF8=0", "TERM=dumb", "COLUMNS=1", "COLUMNS=x"):
        yield Situation("streams", f"{shown} archs", shell=f"{shown} $L archs >/dev/null", code=0)
        yield Situation(
            "streams",
            f"{shown} and a name that is no text",
            shell=f"{shown} $L checkpoint --arch gemma -o $'new\\xff'",
            code=0,
        )


def limits() -> Iterator[Situation]:
    export = "onnx --checkpoint ck -o new -q"
    handles = [(c, f"-n {n}") for c in ("archs", export, "validate small -q") for n in (8, 16)]
    for command, limit in (*handles, (export, "-v 150000"), ("ops", "-v 600000")):
        line = f"ulimit {limit}; $L {command} --json"
        # The first validation records digests.
        changes = frozenset({"small/manifest.json"})
        yield Situation("limits", f"{command}, ulimit {limit}", shell=line, either=True, changes=changes)
    for size in (0, 1, 16):
        line = f"ulimit -f {size}; $L {EXPORT} --weights copy --json -q | cat; exit ${{PIPESTATUS[0]}}"
        yield Situation("limits", f"files of {size} kB", shell=line)


def places() -> Iterator[Situation]:
    """What is around the command: homes, caches, the interpreter's options, other users."""
    export = "$L onnx --checkpoint ck -o new -q --block embedding"
    away = link("loop", "loop")
    for cache in ("/proc/x", "/dev/null", "no/such/place", "loop"):
        yield Situation("places", f"cache {cache}", (), away, 0, f"LLMEXPORT_CACHE={cache} {export}")
    yield Situation("places", "archs without a cache", (), away, 0, "LLMEXPORT_CACHE=loop $L archs >/dev/null")
    yield Situation("places", "HOME that is not there", code=0, shell=f"env -u LLMEXPORT_CACHE HOME=/nowhere {export}")
    for line in ("$L archs", "$L --help", f"LLMEXPORT_CACHE=$PWD/cache {export}"):
        optimised = f"PYTHONOPTIMIZE=2 {line} >/dev/null"
        yield Situation("places", optimised, code=0, shell=optimised, silent=True)
    gone = "mkdir d; cd d; rmdir ../d; $L onnx --arch gemma -o new -q --json"
    yield Situation("places", "a current folder that is gone", shell=gone)
    if os.geteuid() != 0 or not others_can_run_it():
        return
    nobody = f"env -u HOME -u LLMEXPORT_CACHE {OTHER}"
    for line in ("$L archs", export):
        yield Situation("places", f"nobody, {line}", (), open_to_all, 0, f"{nobody} {line} >/dev/null")
    closed = f"mkdir d; {OTHER} $L onnx --checkpoint ck -o d/new -q --json; c=$?"
    yield Situation("places", "an output not to be written", (), open_to_all, shell=f"{closed}; rmdir d; exit $c")
    unread = f"{closed.replace('mkdir', 'mkdir -m 777')}; rmdir d; exit $c"
    yield Situation("places", "a checkpoint not to be read", shell=unread)


def others_can_run_it() -> bool:
    """Whether another user gets to the interpreter and to this code, which a private folder above may hide."""
    probe = [*OTHER.split(), sys.executable, "-c", "import llmexport.export.cli.main"]
    return shutil.which("setpriv") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)


def signals() -> Iterator[Situation]:
    """A signal at a moment of a long command; what it leaves, and what the next run finds."""
    for name in ("INT", "TERM", "HUP"):
        for seconds, command in ((0.5, DEPLOY), (1.2, DEPLOY), (0.6, "engine out -q")):
            line = f"(sleep {seconds}; kill -{name} $$) & exec $L {command}"
            yield Situation(
                "signals",
                f"{name} after {seconds} s of {command.split()[0]}",
                shell=line,
                says=f"interrupted by SIG{name}",
            )
    left = "sleep 2; kill -KILL $!; wait $!; sleep 0.2; ls -d .llmexport-* >&2"
    again = f"$L deploy --arch gemma -o new -q & {left}; $L {EXPORT} -q"
    yield Situation("signals", "KILL, and another run", shell=again, code=0, says=".llmexport-")
    hup = f"(sleep 1; kill -HUP $$) & exec nohup $L {EXPORT} -q"
    yield Situation("signals", "HUP under nohup", shell=hup, code=0)


def references() -> Iterator[Situation]:
    """A config that we take and transformers does not: its rung is not run, the others are."""

    def edit(folder: Path) -> None:
        config = folder / "ck/config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1'))

    line = f"$L {EXPORT} -q; $L validate new --json | grep -q 'transformers does not take'"
    yield Situation("references", "rms_norm_eps of 1", (), edit, 0, line)


def parts() -> Iterator[Situation]:
    """Parts of checkpoints that have them, that have others, and whose towers are not as their configs say."""

    def seeing(folder: Path) -> None:
        random_checkpoint.write(archs.load("llama4"), folder / "eyes", part="all")

    def config(change: Callable[[dict[str, Any]], object]) -> Prepare:
        def edit(folder: Path) -> None:
            said = json.loads((folder / "eyes/config.json").read_text())
            change(said)
            (folder / "eyes/config.json").write_text(json.dumps(said))

        return both(seeing, edit)

    def unseeing(folder: Path) -> None:
        outer = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "vision_config": {}}
        said = {**outer, "text_config": dict(archs.load("gemma4_text").tiny)}
        random_checkpoint.write(archs.choose(None, said), folder / "eyes", config=said, part="text")

    export, eyes = ("onnx", "-o", "new", "--checkpoint"), ("onnx", "-o", "new", "--checkpoint", "eyes")
    for command in ("onnx", "deploy"):
        line = (command, *export[1:], "ck", "--part", "vision")
        yield Situation("parts", f"{command}, vision of a text model", line, says="config.json is of a text model")
    yield Situation("parts", "a part that is none", (*export, "ck", "--part", "ears"), says="'ears'")
    for command in ("onnx", "checkpoint", "deploy"):
        built_in = (command, "--arch", "gemma", "--part", "vision", "-o", "new")
        yield Situation("parts", f"{command}, vision of gemma", built_in, says="has no vision tower here")
    yield Situation("parts", "vision of gemma4", (*eyes, "--part", "vision"), unseeing, says="the text model alone")
    for name, asked, says in (
        ("a static cache of vision", ("--part", "vision", "--cache", "static", "--max-tokens", "64"), "keeps no cache"),
        ("last logits of vision", ("--part", "vision", "--logits", "last"), "gives no logits"),
        ("a block that both parts have", ("--block", "attention"), "vision_attention"),
        ("genai", ("--for", "genai"), "--for genai cannot run a model that reads pictures"),
    ):
        yield Situation("parts", name, (*eyes, *asked), seeing, says=says)
    yield Situation("parts", "onto notes", (*eyes, "--force"), both(seeing, write("new/x")), says="does not replace")
    yield Situation("parts", "a cut shard", eyes, both(seeing, cut(f"eyes/{SHARD}")))
    without = "--part text leaves out"
    changes: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
        "no vision_config": (lambda c: c.pop("vision_config"), "has no 'vision_config'"),
        "a key of another tower": (lambda c: c["vision_config"].update(window_size=112), without),
        "a quantised model": (lambda c: c.update(quantization_config={"quant_method": "modelopt"}), "modelopt"),
        "a tower too deep": (lambda c: c["vision_config"].update(num_hidden_layers=3), "holds 2 layers"),
        "a tower too wide": (lambda c: c["vision_config"].update(intermediate_size=129), without),
        "ties that differ": (lambda c: c.update(tie_word_embeddings=True), "differ in tie_word_embeddings"),
    }
    for name, (change, says) in changes.items():
        yield Situation("parts", name, eyes, config(change), says=says)


SITUATIONS = [
    s
    for kind in (
        force,
        outputs,
        checkpoints,
        exports,
        packs,
        usage,
        streams,
        limits,
        places,
        signals,
        references,
        parts,
    )
    for s in kind()
]
KINDS = tuple(dict.fromkeys(s.kind for s in SITUATIONS))
