"""Pictures beside a prompt: the answers are those of transformers, and what cannot be seen is refused in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from arch_cases import others_slow
from polygraphy.backend.onnxrt import OnnxrtRunner

from llmexport.export import manifest, onnx_file, random_checkpoint
from llmexport.export.archs import choose, load
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import EngineError
from llmexport.export.graph_file import load as load_graph
from llmexport.run import engine
from llmexport.run.checks import check_patches
from llmexport.run.errors import RunError
from llmexport.run.pictures import check_installed
from llmexport.run.prompts import opening
from llmexport.run.session import MOST_FRAMES, MOST_PATCHES, RuntimeSession, opened
from llmexport.validate.pictures import Pictures, sight
from llmexport.validate.runtime import open_session

ARCHS = ("qwen3_5_moe", "llama4", "qwen3_5", "gemma3_text")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.model
Child = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """Asks a process in which torchvision loads whatever torch is there."""
    beside = os.environ.get("LLMEXPORT_VISION")
    if not beside and not importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is not installed, nor in a folder that LLMEXPORT_VISION names")
    command = [sys.executable, str(ROOT / "tests" / "pictures_child.py")]
    environment = {**os.environ, **({"PYTHONPATH": beside} if beside else {})}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin
        to, back = process.stdin, process.stdout
        assert back

        def ask(what: dict[str, Any]) -> Any:
            to.write(json.dumps(what) + "\n")
            to.flush()
            return json.loads(back.readline())

        yield ask
        to.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of several sizes, a video, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size, seed in (("cat", (80, 48), 0), ("dog", (36, 64), 1), ("dot", (8, 8), 2)):
        drawn(size, seed).save(folder / f"{name}.png")
    (folder / "video").mkdir()
    for frame in range(4):
        drawn((48, 32), frame + 5).save(folder / "video" / f"{frame}.png")
    (folder / "mixed").mkdir()
    for frame, size in enumerate([(48, 32), (32, 32)]):
        drawn(size, frame).save(folder / "mixed" / f"{frame}.png")
    (folder / "empty").mkdir()
    (folder / "words.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "cat.png").read_bytes()[:100])
    return folder


def drawn(size: tuple[int, int], seed: int) -> PIL.Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return PIL.Image.fromarray(numbers).resize(size)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """The built-in tiny checkpoint of an architecture, in fp32, and its export."""
    folder, known = tmp_path_factory.mktemp("made"), dict[str, tuple[Path, Path]]()

    def make(arch: str) -> tuple[Path, Path]:
        if arch not in known:
            checkpoint, export = folder / f"{arch}-checkpoint", folder / arch
            random_checkpoint.write(load(arch), checkpoint, dtype="float32", part="all")
            opened = open_checkpoint(checkpoint)
            onnx_file.write(onnx_file.Request(choose(None, opened.config), opened), export)
            known[arch] = checkpoint, export
        return known[arch]

    return make


def answer(child: Child, export: Path, prompt: str, *options: str, tokens: int = 12) -> dict[str, Any]:
    found = child(
        {"run": ["generate", str(export), "--prompt", prompt, *options, f"--max-new-tokens={tokens}", "--json", "-q"]}
    )
    read: dict[str, Any] = json.loads(found["out"])
    return read


LONG = "what is it, and why is it there? " * 4  # over 64 tokens behind the pictures
TAGS = {"image": "<|vision_start|><|image_pad|><|vision_end|>", "video": "<|vision_start|><|video_pad|><|vision_end|>"}
ASKED = [
    ("qwen3_5_moe", LONG, ("cat", "dog"), True, False),
    ("qwen3_5_moe", f"a {TAGS['image']} b {TAGS['video']} c {TAGS['image']} d", ("dog", "cat"), True, True),
    ("qwen3_5", "what?", ("dot",), False, False),
    ("qwen3_5", LONG, ("dog",), True, False),
    ("llama4", LONG, ("cat", "dog", "dot"), False, False),
    ("llama4", "a <|image|> b <|image|>", ("dog", "cat"), False, True),
    ("gemma3_text", LONG, ("cat", "dog"), False, False),
    ("gemma3_text", "a <start_of_image> b <start_of_image>", ("dog", "cat"), False, True),
]


@pytest.mark.parametrize(
    ("arch", "prompt", "images", "video", "raw"), others_slow(ASKED, [ASKED[0], ASKED[1], ASKED[4], ASKED[6]])
)
def test_an_answer_is_that_of_transformers(arch, prompt, images, video, raw, made, folder, child) -> None:
    checkpoint, export = made(arch)
    paths, videos = [str(folder / f"{n}.png") for n in images], [str(folder / "video")] * video
    options = [f"--image={p}" for p in paths] + [f"--video={v}" for v in videos] + ["--raw"] * raw
    asked = {"checkpoint": str(checkpoint), "prompt": prompt, "images": paths, "videos": videos, "raw": raw}
    expected = child({"generate": asked | {"tokens": 32}})
    found = answer(child, export, prompt, *options, tokens=32)
    assert found["prompt_ids"] == expected["prompt_ids"]
    assert found["ids"] == expected["ids"]


@pytest.mark.parametrize("arch", ["qwen3_5_moe", "llama4"])
def test_a_prompt_without_pictures_is_answered_as_before(arch, made, child) -> None:
    checkpoint, export = made(arch)
    asked = {"checkpoint": str(checkpoint), "prompt": "what is it?", "raw": True}
    assert answer(child, export, "what is it?", "--raw")["ids"] == child({"generate": asked})["ids"]


def test_pan_and_scan_is_what_the_processor_makes_of_it(made, folder, child, tmp_path) -> None:
    """Gemma's has a default of its own, whatever its file says (processing_gemma3.py, images_kwargs)."""
    checkpoint, cropping = made("gemma3_text")[0], tmp_path / "checkpoint"
    shutil.copytree(checkpoint, cropping)
    file = cropping / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_pan_and_scan": True}))
    opened = open_checkpoint(cropping)
    onnx_file.write(onnx_file.Request(choose(None, opened.config), opened), tmp_path / "out")
    image = str(folder / "cat.png")
    expected = child({"generate": {"checkpoint": str(cropping), "prompt": "what?", "images": [image]}})
    found = answer(child, tmp_path / "out", "what?", f"--image={image}")
    assert (found["prompt_ids"], found["ids"]) == (expected["prompt_ids"], expected["ids"])


def test_tiles_of_many_patches_are_seen_one_by_one(made, monkeypatch) -> None:
    session = RuntimeSession(manifest.read(made("gemma3_text")[1]))
    for patches, tiles in ((36, 1), (35, 1), (72, 4), (10**6, MOST_FRAMES)):
        monkeypatch.setattr("llmexport.run.session.MOST_PATCHES", patches)
        assert session.at_once == (patches, tiles)


WRONG = [
    ("a picture that is text", "words.png", "--image", "no image of"),
    ("a picture that is cut", "cut.png", "--image", "is damaged"),
    ("no picture", "none.png", "--image", "cannot read the image"),
    ("a folder for a picture", "video", "--image", "cannot read the image"),
    ("a video without frames", "empty", "--video", "has no frames"),
    ("a video of two sizes", "mixed", "--video", "give frames of one size"),
    ("a file for a video", "cat.png", "--video", "cannot read the video"),
]


@pytest.mark.parametrize(("name", "option", "says"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_no_picture_is_refused_in_one_line(name, option, says, made, folder, child) -> None:
    _, export = made("qwen3_5_moe")
    found = child({"run": ["generate", str(export), "--prompt", "what?", option, str(folder / name), "-q"]})
    assert found["code"] == 2
    [line] = found["err"].splitlines()
    assert says in line


def test_llama_4_takes_no_video(made, folder, child) -> None:
    _, export = made("llama4")
    assert "takes no video" in answer(child, export, "what?", f"--video={folder / 'video'}")["error"]


def test_placeholders_that_are_not_as_many_as_pictures_are_refused(made, folder, child) -> None:
    _, export = made("qwen3_5_moe")
    image = f"--image={folder / 'cat.png'}"
    assert "number of images passed" in answer(child, export, "what?", image, "--raw")["error"]
    twice = answer(child, export, TAGS["image"] * 2, image, "--raw")["error"]
    assert "2 <|image_pad|> tokens and 1 images" in twice
    assert twice.endswith("give other pictures, or another prompt")
    assert "none is given" in answer(child, export, TAGS["image"], "--raw")["error"]


def test_a_text_model_and_a_tower_alone_answer_no_picture(made, folder, child, tmp_path) -> None:
    opened = open_checkpoint(made("qwen3_5_moe")[0])
    for part, says in (("text", "export it with --part all"), ("vision", "export it with --part all")):
        onnx_file.write(onnx_file.Request(choose(None, opened.config), opened, part=part), tmp_path / part)
        assert says in answer(child, tmp_path / part, "what?", f"--image={folder / 'cat.png'}")["error"]


def test_a_processor_that_is_missing_or_of_another_model_is_told(made, folder, child, tmp_path) -> None:
    checkpoint, _ = made("qwen3_5_moe")
    broken = tmp_path / "checkpoint"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    opened = open_checkpoint(broken)
    said = json.loads((broken / "preprocessor_config.json").read_text())
    (broken / "preprocessor_config.json").write_text(json.dumps({**said, "patch_size": 8}))
    request = onnx_file.Request(choose(None, opened.config), opened)
    onnx_file.write(request, tmp_path / "other")
    image = f"--image={folder / 'cat.png'}"
    assert "of the same model?" in answer(child, tmp_path / "other", "what?", image)["error"]
    (broken / "preprocessor_config.json").unlink()
    onnx_file.write(request, tmp_path / "none")
    assert "copy preprocessor_config.json" in answer(child, tmp_path / "none", "what?", image)["error"]


def test_the_walk_through_goes_from_an_image_to_an_answer(child, tmp_path, monkeypatch) -> None:
    text = (ROOT / "export" / "README.md").read_text().partition("## From an image to an answer")[2]
    lines = text.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert len(lines) == 4
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "python":
            subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
            continue
        assert program == "llmexport"
        arguments = [str(tmp_path / a) if a in ("CK", "OUT", "cat.png") else a for a in arguments]
        found = child({"run": arguments})
        assert found["code"] == 0, found["err"]
    assert found["out"].strip()


def test_what_is_not_installed_is_named(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    with pytest.raises(RunError, match="torchvision must be installed: pip install torchvision"):
        check_installed()


def test_a_picture_that_takes_more_than_the_machine_has_is_refused(made) -> None:
    export = manifest.read(made("qwen3_5_moe")[1])
    check_patches(export, Pictures(np.empty(0), np.array([(1, 8, 8)])))
    with pytest.raises(RunError, match="lower longest_edge in preprocessor_config"):
        check_patches(export, Pictures(np.empty(0), np.array([(1, 2, 2), (1, 4096, 4096)])))


def test_a_picture_whose_scores_are_made_some_at_a_time_may_have_more_patches(exported, monkeypatch) -> None:
    """Of two heads in fp32 eight bytes for each pair, of the mask alone two."""
    plain, lowered = (
        manifest.read(exported("qwen3_5_moe", part="all", target=target)) for target in ("portable", "onnxruntime")
    )
    pictures = Pictures(np.empty(0), np.array([(1, 64, 64)]))
    for export, needs in ((plain, 8 * 4096**2), (lowered, 2 * 4096**2)):
        for there, refused in ((needs, False), (needs - 1, True)):
            monkeypatch.setattr("os.sysconf", lambda name, there=there: there if name == "SC_PHYS_PAGES" else 1)
            with pytest.raises(RunError) if refused else contextlib.nullcontext():
                check_patches(export, pictures)


@pytest.mark.parametrize("arch", others_slow(ARCHS, ["qwen3_5_moe"]))
def test_pictures_that_are_seen_some_at_a_time_give_what_all_give_at_once(arch, made, monkeypatch) -> None:
    export = manifest.read(made(arch)[1])
    seen = sight(export.blocks)
    assert seen
    random = np.random.default_rng(0)
    if seen.merge:
        grids = np.array([(1, 6, 4), (3, 4, 4), (1, 2, 2)])
        pictures = Pictures(random.standard_normal((24 + 48 + 4, *seen.pixels.shape[1:]), np.float32), grids)
    else:
        pictures = Pictures(random.standard_normal((5, *seen.pixels.shape[1:]), np.float32))
    runs = [[1, *[seen.tokens[0]] * n] for n in seen.runs(pictures)]
    stage = opening(np.array([[*itertools.chain(*runs), 2, 3]]), pictures, seen)
    session = RuntimeSession(export)
    scores = session.run(stage)
    pieces = [len(p.pixels) for p in pictures.pieces(20, 2)]
    assert pieces == ([24, 16, 16, 20] if seen.merge else [2, 2, 1])
    assert [len(p.pixels) for p in pictures.pieces(MOST_PATCHES, MOST_FRAMES)] == [len(pictures.pixels)]
    monkeypatch.setattr("llmexport.run.session.MOST_PATCHES", 20)
    monkeypatch.setattr("llmexport.run.session.MOST_FRAMES", 2)
    assert np.abs(session.run(stage) - scores).max() < 1e-5


def test_an_engine_sees_no_more_at_once_than_its_profile_takes(made, monkeypatch) -> None:
    """In the place of TensorRT's runner stands ONNX Runtime's, and of engine.json a profile."""
    export = manifest.read(made("qwen3_5_moe")[1])
    seen = sight(export.blocks)
    assert seen
    grids = np.array([(3, 4, 4), (1, 6, 4)])
    pixels = np.random.default_rng(0).standard_normal((72, *seen.pixels.shape[1:]), np.float32)
    pictures, image = Pictures(pixels, grids), seen.tokens[0]
    ids = np.array([[*itertools.chain(*([1, *[image] * n] for n in (4, 4, 4, 6))), 2]])
    stage, calls = opening(ids, pictures, seen), list[int]()

    class Runner(OnnxrtRunner):
        def infer_impl(self, feed_dict):
            calls.extend(len(feed_dict[n]) for n in feed_dict if n == "grid_thw")
            return super().infer_impl(feed_dict)

    def runner(export, graph):
        return Runner(open_session(load_graph(export, graph), export.folder))

    profile = {"images": (1, 1, 2), "features": (1, 8, 8), "spliced": (0, 8, 18)}
    record = types.SimpleNamespace(profile=profile)
    monkeypatch.setattr(engine, "EngineRunner", runner)
    monkeypatch.setattr(engine, "unable", lambda export: "")
    monkeypatch.setattr("llmexport.export.engine_record.read", lambda folder: record)
    with opened(export, "engine") as session:
        assert np.abs(session.run(stage) - RuntimeSession(export).run(stage)).max() < 1e-5
        assert calls == [2, 1, 1]
        for axis, size in (("features", 6), ("spliced", 18)):
            record.profile = profile | {axis: (0, 1, size - 1)}
            with pytest.raises(EngineError, match=f"{axis} is {size}, the engine takes"):
                session.run(stage)
