"""Text models in multimodal checkpoints: which keys are theirs, and what is said of a tower that is not exported."""

import copy
import json
import re
from pathlib import Path

import pytest
import transformers
from commands import Run, runner
from layouts import WHOLE, outer
from tiny_configs import one_line, read, read_whole, refusal_of_whole

from llmexport.export import archs, random_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model

FLAT = [kind for kind in WHOLE if outer(kind).flat]
# transformers writes a tie of its own beside the text model of the one that is left out.
TIED_OUTSIDE = [kind for kind in WHOLE if kind != "mistral3"]


@pytest.mark.parametrize("kind", TIED_OUTSIDE)
def test_the_tie_may_be_said_beside_the_text_model(kind):
    arch = archs.load(WHOLE[kind])
    whole = {"model_type": kind, "text_config": {k: v for k, v in arch.tiny.items() if k != "tie_word_embeddings"}}
    assert read_model(arch, whole | {"tie_word_embeddings": True}).ties
    assert not read_model(arch, whole | {"tie_word_embeddings": False}).ties
    # What a config means that does not say.
    assert bool(read_model(arch, whole).ties) == (kind in ("gemma3", "gemma4"))


@pytest.mark.parametrize("kind", TIED_OUTSIDE)
@pytest.mark.parametrize("tied", [True, False])
def test_two_ties_that_differ_are_refused(kind, tied):
    line = refusal_of_whole(kind, {"tie_word_embeddings": tied}, tie_word_embeddings=not tied)
    assert "config.json and its text_config differ in tie_word_embeddings" in line


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_model_of_mistral_3_says_the_tie(tied):
    assert bool(read_whole("mistral3", {"tie_word_embeddings": not tied}, tie_word_embeddings=tied).ties) == tied


@pytest.mark.parametrize("kind", [k for k in WHOLE if not outer(k).flat])
@pytest.mark.parametrize("key", ["hidden_size", "rope_theta", "speech_config"])
def test_an_unknown_key_beside_the_text_model_is_refused(kind, key):
    assert f"{key}=" in refusal_of_whole(kind, {key: 4096})


@pytest.mark.parametrize("kind", FLAT)
def test_keys_of_a_text_model_at_two_places_must_agree(kind):
    assert read_whole(kind, {"hidden_size": 64, "sliding_window": 8}) == read(WHOLE[kind])
    line = refusal_of_whole(kind, {"hidden_size": 4096, "sliding_window": 9})
    assert "config.json and its text_config differ in hidden_size, sliding_window: make them agree" in line
    assert "audio_config" in refusal_of_whole(kind, {"audio_config": {}})
    if kind in FLAT:
        assert "says rope_theta beside text_config, which alone is read" in refusal_of_whole(kind, {"rope_theta": 100})


def test_a_text_model_that_does_not_slide_takes_no_window():
    """Qwen3VLTextConfig knows no such key, and the attention of its model is full."""
    config = {"use_sliding_window": True, "sliding_window": 8}
    arch = archs.load("qwen3")
    whole = {"model_type": "qwen3_vl", "text_config": {**arch.tiny, "model_type": "qwen3_vl_text", **config}}
    with pytest.raises(ExportError, match="use_sliding_window is no key of a qwen3_vl_text"):
        read_model(arch, whole)


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("rope", [{"type": "mrope"}, {"type": "default", "rope_type": "default"}])
def test_sections_of_rope_say_nothing_where_a_token_has_one_position(kind, rope):
    arch = archs.load(WHOLE[kind])
    text = {k: v for k, v in arch.tiny.items() if k != "rope_parameters"}
    beside = {"rope_theta": 1000000.0, "rope_scaling": rope | {"mrope_section": [2, 3, 3]}, "vision_token_id": 7}
    assert read_model(arch, {"model_type": kind, **text, **beside}) == read(arch.name)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_key_that_is_missing_means_what_it_means_to_the_class_of_the_text_model(kind):
    """Not to that of the architecture, whose theta and epsilon are others."""
    arch = archs.load(WHOLE[kind])
    text = {k: v for k, v in arch.tiny.items() if k not in ("rope_parameters", "rms_norm_eps", "max_window_layers")}
    config = {"model_type": kind, "text_config": text}
    theirs = transformers.CONFIG_MAPPING[kind](**copy.deepcopy(config)).to_dict()
    assert read_model(arch, config) == read_model(arch, theirs)


@pytest.mark.parametrize("kind", WHOLE)
def test_quantisation_that_is_said_beside_the_text_model_is_refused(kind):
    line = refusal_of_whole(kind, {"quantization_config": {"quant_method": "aqlm", "bits": 4}})
    assert "quantization_config says that the weights are quantised (aqlm, 4 bits)" in line


@pytest.mark.parametrize("kind", WHOLE)
def test_an_unknown_key_of_the_text_model_is_refused(kind):
    assert "attn_logit_cap=50.0" in refusal_of_whole(kind, attn_logit_cap=50.0)


@pytest.mark.parametrize("kind", WHOLE)
def test_harmless_keys_beside_the_text_model_change_nothing(kind):
    beside = dict.fromkeys(outer(kind).harmless, 7) | {"transformers_version": "4.57.0"}
    assert read_whole(kind, beside) == read(WHOLE[kind])


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("inner", [None, 1, [], "config.json"])
def test_a_multimodal_config_without_a_text_model_is_refused(kind, inner):
    with pytest.raises(ExportError) as error:
        read_model(archs.load(WHOLE[kind]), {"model_type": kind, "text_config": inner})
    assert "no 'text_config'" in one_line(error.value)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_config_is_known_by_its_type_alone_or_within_a_multimodal_one(kind):
    known = archs.load(WHOLE[kind])
    for said, architecture in (
        (known.model_types[0], known.reference.model_class),
        (kind, outer(kind).architecture),
    ):
        text = {"text_config": {"model_type": known.model_types[0]}}
        assert archs.choose(None, {"model_type": said, "architectures": [architecture], **text}).name == known.name


@pytest.mark.parametrize("kind", WHOLE)
def test_another_head_than_the_one_of_its_type_is_refused(kind):
    with pytest.raises(ExportError, match=re.escape(f"exports ['{outer(kind).architecture}']")):
        archs.choose(None, {"model_type": kind, "architectures": [archs.load(WHOLE[kind]).reference.model_class]})


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("inner", ["llama", "ministral3", "", None, ["x"]])
def test_a_text_model_of_another_type_is_refused(kind, inner):
    types = outer(kind).text_types or archs.load(WHOLE[kind]).model_types
    line = refusal_of_whole(kind, model_type=inner)
    assert f"text_config is of model_type {inner!r}, expected {' or '.join(types)}" in line


@pytest.mark.parametrize("inner", [{"model_type": "mistral4"}, {"model_type": ["mistral"]}, {}])
def test_a_text_model_that_none_of_several_fits_is_refused_by_all_of_them(inner):
    with pytest.raises(ExportError) as error:
        archs.choose(None, {"model_type": "mistral3", "text_config": inner})
    found = inner.get("model_type")
    assert one_line(error.value).endswith(f"text_config is of model_type {found!r}, expected ministral3 or mistral")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys)


def multimodal(folder: Path) -> None:
    """A checkpoint, without the tower that nobody exports."""
    arch = archs.load("qwen3")
    kind = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}
    config = {**kind, "text_config": dict(arch.tiny), "vision_config": {}}
    random_checkpoint.write(archs.choose(None, config), folder, config=config)


@pytest.mark.model
@pytest.mark.parametrize("part", ["all", "text"])
def test_a_tower_that_is_not_exported_is_noted(part: str, run: Run, tmp_path: Path) -> None:
    multimodal(tmp_path / "ck")
    asked = ("--checkpoint", tmp_path / "ck", "--block", "norm", "--part", part)
    code, out, err = run("onnx", *asked, "-o", "out", "--json")
    [note] = json.loads(out)["notes"]
    assert (code, f"note: {note}\n" in err) == (0, True)
    assert note == "qwen3_vl: the text model alone is exported, model.visual.* left out: it takes no pictures"


def test_a_tower_that_is_not_exported_is_refused_alone(run: Run, tmp_path: Path) -> None:
    multimodal(tmp_path / "ck")
    code, _, err = run("onnx", "--checkpoint", tmp_path / "ck", "-o", "out", "--part", "vision")
    line = "error: --part vision: of qwen3_vl the text model alone is exported: leave --part out\n"
    assert (code, err) == (2, line)
    assert not (tmp_path / "out").exists()
