"""From pictures beside a prompt to what a vision graph reads, by the checkpoint's own processor of transformers."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmexport.export.archs import load
from llmexport.export.exported import Export
from llmexport.export.multimodal import outer_of
from llmexport.export.values import one_line
from llmexport.plugins.regular import read_regular
from llmexport.run.errors import RunError
from llmexport.validate.pictures import Pictures, Sight, frames_of, sight

# What the processors of transformers are made of.
NEEDED = {"transformers": "transformers", "PIL": "pillow", "torchvision": "torchvision"}
# Of what pillow reads; some of the other formats it gives to programs that run what is in the file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# What processors call the colours and the grids of images and of videos, and which of a model's tokens they are.
KINDS = (("pixel_values", "image_grid_thw", 0), ("pixel_values_videos", "video_grid_thw", -1))
MOST = 1_000_000_000  # bytes of a file
MOST_FRAMES = 4096
FPS = 2.0  # of a video whose processor does not say how many frames it takes of a second


@dataclass(frozen=True)
class Asked:
    """Images, and videos as frames, that a prompt is given with: of pillow, in RGB."""

    images: tuple[Any, ...]
    videos: tuple[tuple[Any, ...], ...]

    @property
    def parts(self) -> list[dict[str, str]]:
        """What of a message's content they are."""
        return [{"type": "image"}] * len(self.images) + [{"type": "video"}] * len(self.videos)


def check_sees(export: Export) -> Sight:
    """How an export sees. Raises RunError if it does not."""
    seen = sight(export.blocks)
    if seen is None:
        outer = outer_of(load(export.arch), export.config)
        do = "export it with --part all" if outer and outer.tower else "give a text alone"
        raise RunError(f"{export.folder} is a text model, which sees no pictures: {do}")
    return seen


def check_installed() -> None:
    """Raise RunError unless what makes pictures ready is installed and loads."""
    if missing := [package for module, package in NEEDED.items() if not importlib.util.find_spec(module)]:
        raise RunError(f"for pictures {', '.join(missing)} must be installed: pip install {' '.join(missing)}")
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise RunError(
            f"torchvision does not load beside the torch here ({one_line(error)}): install both from one index"
        ) from error


def read_pictures(images: Sequence[str | os.PathLike[str]], videos: Sequence[str | os.PathLike[str]]) -> Asked:
    """Opens image files, and folders of frames. Raises RunError on one that cannot be read."""
    return Asked(tuple(read_image(Path(p)) for p in images), tuple(tuple(read_frames(Path(p))) for p in videos))


def read_image(path: Path) -> Any:
    """The image in a file, of an animation the first, in RGB as transformers.image_utils.load_image has it."""
    import PIL.Image
    import PIL.ImageOps

    try:
        data = read_regular(path, MOST)
    except OSError as error:
        raise RunError(f"cannot read the image {path}: {error.strerror}: give an image file") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except PIL.UnidentifiedImageError as error:
        raise RunError(f"{path} is no image of {', '.join(FORMATS)}: convert it to one") from error
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        most = PIL.Image.MAX_IMAGE_PIXELS
        raise RunError(f"{path} has more than the {most} pixels that an image may have: give a smaller one") from error
    except Exception as error:  # pillow's readers raise what they like on a damaged file
        raise RunError(f"{path} is damaged ({one_line(error)}): give another image") from error


def read_frames(folder: Path) -> Iterator[Any]:
    """The frames of a video, which are the files of a folder, by name."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise RunError(f"cannot read the video {folder}: {error.strerror}: give a folder of its frames") from error
    if not names:
        raise RunError(f"{folder} has no frames: give a folder with an image for each")
    if len(names) > MOST_FRAMES:
        raise RunError(f"{folder} has {len(names)} frames, at most {MOST_FRAMES} are read: take fewer of a second")
    size = None
    for name in names:
        frame = read_image(folder / name)
        size = size or frame.size
        if frame.size != size:
            raise RunError(
                f"{folder / name} is {frame.size[0]} x {frame.size[1]}, the frames before it {size[0]} x {size[1]}: "
                "give frames of one size"
            )
        yield frame


def read_processor(folder: Path) -> Any:
    """The processor of an export's checkpoint, from the files in its folder alone."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        made = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what is wrong with such files shows in many ways
        raise RunError(_no_processor(folder, one_line(error))) from error
    if not hasattr(made, "image_processor"):
        raise RunError(_no_processor(folder, f"{type(made).__name__} is none for pictures"))
    return made


def _no_processor(folder: Path, why: str) -> str:
    return (
        f"{folder} has no processor that transformers reads ({why}): copy preprocessor_config.json, "
        "processor_config.json, video_preprocessor_config.json, what there is of them, from the checkpoint"
    )


def process(export: Export, text: str, asked: Asked, *, special: bool) -> tuple[list[int], Pictures]:
    """The tokens of a text, in which a placeholder stands for each picture, and the pictures in their order.

    special: with the tokens that the tokenizer puts around a text. Raises RunError.
    """
    seen, processor = check_sees(export), read_processor(export.folder)
    given: dict[str, Any] = {"images": list(asked.images)} if asked.images else {}
    if asked.videos:
        if not hasattr(processor, "video_processor"):
            raise RunError(f"the checkpoint's processor, {type(processor).__name__}, takes no video: give images")
        given |= _videos(asked.videos, getattr(processor.video_processor, "fps", None) or FPS)
    try:
        made = processor(text=[text], add_special_tokens=special, return_tensors="pt", **given)
    except Exception as error:  # whatever a processor does wrong with a picture is no fault of ours
        raise RunError(
            f"the checkpoint's processor does not take these: {one_line(error)}: give other pictures, or another prompt"
        ) from error
    ids = made["input_ids"][0].tolist()
    return ids, _pictures(ids, seen, made)


def _videos(videos: Sequence[Sequence[Any]], fps: float) -> dict[str, Any]:
    """Videos as a processor takes them: all their frames, so many of a second."""
    facts = [
        {"total_num_frames": len(v), "fps": fps, "duration": len(v) / fps, "frames_indices": list(range(len(v)))}
        for v in videos
    ]
    return {"videos": [list(v) for v in videos], "video_metadata": facts, "do_sample_frames": False}


def _pictures(ids: Sequence[int], seen: Sight, made: Mapping[str, Any]) -> Pictures:
    """What a processor made of images and of videos, in the order of their tokens; checked against these."""
    kinds: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for pixels, grid, which in KINDS:
        if pixels not in made:
            continue
        values, shape = made[pixels].float().numpy(), seen.pixels.shape[1:]
        if values.shape[1:] != shape:
            raise RunError(
                _disagrees(f"makes pieces of {list(values.shape[1:])} numbers, the graph takes {list(shape)}")
            )
        if seen.merge and grid not in made:
            raise RunError(_disagrees(f"says no {grid}, which the graph reads"))
        kinds[seen.tokens[which]] = values, made[grid].numpy() if seen.merge else np.empty(0)
    if not seen.merge:
        pictures = Pictures(np.concatenate([values for values, _ in kinds.values()]))
        tokens, takes = sum(i in seen.tokens for i in ids), sum(seen.runs(pictures))
        if tokens != takes:
            raise RunError(_disagrees(f"makes tiles that take {takes} tokens, and puts {tokens} into the prompt"))
        return pictures
    frames = {token: _frames(values, grid, seen.merge) for token, (values, grid) in kinds.items()}
    ordered, at = list[Pictures](), 0
    while at < len(ids):
        token = ids[at]
        if token not in seen.tokens:
            at += 1
            continue
        frame = next(frames[token], None) if token in frames else None
        if frame is None:
            raise RunError(f"the prompt has placeholders for more pictures than the {len(ordered)} that are given")
        [takes] = seen.runs(frame)
        if (has := sum(1 for _ in itertools.takewhile(token.__eq__, ids[at : at + takes]))) != takes:
            raise RunError(_disagrees(f"gives picture {len(ordered) + 1} {has} tokens, its grid takes {takes}"))
        ordered.append(frame)
        at += takes
    if left := sum(1 for rest in frames.values() for _ in rest):
        raise RunError(f"{len(ordered) + left} pictures are given, the prompt has placeholders for {len(ordered)}")
    return Pictures(*(np.concatenate(parts) for parts in zip(*((f.pixels, f.grids) for f in ordered), strict=True)))


def _frames(pixels: np.ndarray, grids: np.ndarray, merge: int) -> Iterator[Pictures]:
    """Images, and the frames of videos, one by one."""
    if len(pixels) != grids.prod(1).sum():
        raise RunError(_disagrees(f"makes {len(pixels)} patches, its grids are of {grids.prod(1).sum()}"))
    at = 0
    for _, height, width in frames_of(grids).tolist():
        if height % merge or width % merge:
            raise RunError(_disagrees(f"makes {height} x {width} patches, of which {merge} x {merge} make a token"))
        end = at + height * width
        yield Pictures(pixels[at:end], np.array([(1, height, width)]))
        at = end


def _disagrees(how: str) -> str:
    return f"the checkpoint's processor {how}: are the processor's files and config.json of the same model?"
