"""Engines run alike with TensorRT 10, TensorRT 11 and TensorRT-RTX, each held to the names that its API has."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_model
from engine_folder import PLAN, WEIGHTS, make_engine, ports
from tensorrt_stand_in import APIS, INVALID, Stand

from llmexport.export import engine_record
from llmexport.plugins.errors import PluginError
from llmexport.validate import engine_api, engine_run
from llmexport.validate.pack import BITS
from llmexport.validate.wire import Arrays, receive, send

DTYPES = ["float32", "float16", "bfloat16"]
each_api = pytest.mark.parametrize("api", APIS, ids=lambda a: f"{a['module']}-{a['version']}")


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    engine = engine_record.read(folder)
    plans = {n: dataclasses.asdict(p) for n, p in engine.graphs.items()}
    lists = engine_run.json.loads(engine_run.json.dumps(plans))
    files = [dataclasses.asdict(f) for f in engine.weights]
    return {"folder": str(folder), "libraries": [], "plans": lists, "weights": files, **changes}


def talk(stand: Stand, said: dict[str, Any], *messages: tuple[dict[str, Any], Arrays]) -> list[Any]:
    """What the process answers to these messages, until it ends."""
    asked, answers = io.BytesIO(), io.BytesIO()
    for message, feed in messages:
        send(asked, message, feed)
    asked.seek(0)
    engine_run.serve(stand.trt, stand.runner, stand.place, said, asked, answers)
    answers.seek(0)
    found = []
    while answer := receive(answers):
        found.append(answer)
    return found


LOAD: tuple[dict[str, Any], Arrays] = ({"load": True}, {})


def stand_for(api: dict[str, Any], dtype: str = "float16") -> Stand:
    return Stand(api, *ports(dtype), dtype)


@each_api
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_answers_a_prompt_with_an_empty_past_and_a_step_after_it(api, dtype: str, tmp_path: Path) -> None:
    folder, stand = make_engine(tmp_path / "out", dtype=dtype), stand_for(api, dtype)
    kind = np.dtype(BITS.get(dtype, dtype))
    prompt = {"input_ids": np.arange(10).reshape(2, 5), "past": np.zeros((2, 2, 0, 8), kind)}
    expected = toy_model.run(prompt, dtype)
    step = {"input_ids": np.array([[3], [30]]), "past": expected["present"]}
    found = talk(stand, job(folder), LOAD, ({"graph": "model"}, prompt), ({"graph": "model"}, step))
    assert [m for m, _ in found] == [
        {"version": api["version"]},
        {"loaded": ["model"]},
        {"seconds": 0.25},
        {"seconds": 0.25},
    ]
    for (_, outputs), right in zip(found[2:], (expected, toy_model.run(step, dtype)), strict=True):
        assert {n: (a.dtype, a.shape) for n, a in outputs.items()} == {n: (a.dtype, a.shape) for n, a in right.items()}
        assert all((outputs[n] == right[n]).all() for n in right)


@each_api
def test_kernels_that_depend_on_what_ran_before_are_turned_off_where_there_are_such(api, tmp_path: Path) -> None:
    stand = stand_for(api)
    talk(stand, job(make_engine(tmp_path / "out")), LOAD)
    strategy = "NONE" if api["module"] == "tensorrt_rtx" else None
    assert stand.done[:2] == [("deserialise", 1000), ("context", strategy)]


@each_api
def test_the_details_that_a_plan_holds_are_not_said_at_every_step(api, tmp_path: Path) -> None:
    stand = stand_for(api)
    talk(stand, job(make_engine(tmp_path / "out")), LOAD)
    assert stand.done[2:] == [("nvtx", "LAYER_NAMES_ONLY")]


def test_polygraphy_takes_the_module_that_the_engine_is_of() -> None:
    taken = {m: engine_api.environment(m, {"HOME": "h"}) for m in ("tensorrt", "tensorrt_rtx")}
    assert taken == {
        "tensorrt": {"HOME": "h", "POLYGRAPHY_USE_TENSORRT_RTX": "0"},
        "tensorrt_rtx": {"HOME": "h", "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    }


@each_api
@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"y" + d[1:]], ids=["cut", "long", "altered"]
)
def test_another_plan_never_reaches_the_deserialiser(api, change, tmp_path: Path) -> None:
    folder, stand = make_engine(tmp_path / "out"), stand_for(api)
    said = job(folder)
    (folder / PLAN).write_bytes(change((folder / PLAN).read_bytes()))
    [_, (answer, _)] = talk(stand, said, LOAD)
    assert "build it again" in answer["refused"]
    assert stand.done == []


@each_api
def test_weights_beside_the_plan_are_placed_once_and_read_by_every_step(api, tmp_path: Path) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    folder, stand = make_engine(tmp_path / "out", weights={"matrix": weight}), stand_for(api)
    stand.kinds["matrix"] = "FLOAT"
    prompt = {"input_ids": np.arange(10).reshape(2, 5), "past": np.zeros((2, 2, 0, 8), np.float16)}
    found = talk(stand, job(folder), LOAD, ({"graph": "model"}, prompt), ({"graph": "model"}, prompt))
    assert len(found) == 4
    assert [what for what, _ in stand.done] == ["deserialise", "context", "nvtx", "place"]
    assert (stand.placed["matrix"].array == weight.T).all()


def test_weights_that_are_not_those_that_were_exported_are_refused(tmp_path: Path) -> None:
    folder, stand = make_engine(tmp_path / "out", weights={"matrix": np.ones((3, 4), np.float32)}), stand_for(APIS[0])
    stand.kinds["matrix"] = "FLOAT"
    altered = bytearray((folder / WEIGHTS).read_bytes())
    altered[-1] ^= 1
    (folder / WEIGHTS).write_bytes(altered)
    assert WEIGHTS in talk(stand, job(folder), LOAD)[-1][0]["refused"]


@each_api
def test_the_plugin_library_is_registered_before_a_plan_is_deserialised(api, tmp_path: Path, monkeypatch) -> None:
    folder, stand = make_engine(tmp_path / "out"), stand_for(api)
    monkeypatch.setattr(engine_run.library, "load", lambda trt, path: stand.done.append(("library", trt, str(path))))
    talk(stand, job(folder, libraries=["plugins.so"]), LOAD)
    assert stand.done[:2] == [("library", stand.trt, "plugins.so"), ("deserialise", 1000)]


def test_a_plugin_library_that_cannot_be_loaded_is_said_and_nothing_is_deserialised(
    tmp_path: Path, monkeypatch
) -> None:
    folder, stand = make_engine(tmp_path / "out"), stand_for(APIS[0])

    def refuse(trt: Any, path: Path) -> None:
        raise PluginError("no plugin library")

    monkeypatch.setattr(engine_run.library, "load", refuse)
    found = talk(stand, job(folder, libraries=["plugins.so"]), LOAD)
    assert found[-1][0] == {"refused": "no plugin library"}
    assert stand.done == []


def test_what_tensorrt_rtx_says_against_a_plan_is_said_with_the_cure(tmp_path: Path) -> None:
    [api] = [a for a in APIS if a["module"] == "tensorrt_rtx"]
    folder, stand = make_engine(tmp_path / "out"), stand_for(api)
    flags = stand.trt.EngineInvalidityDiagnostics
    for found, says in (
        (flags.UNSUPPORTED_CC, "UNSUPPORTED_CC: it does not run on this GPU, build it here with --backend tensorrt"),
        (flags.OLD_CUDA_DRIVER | flags.CUDA_ERROR, "CUDA_ERROR; OLD_CUDA_DRIVER: update the driver"),
        (0, "it gives no reason"),
    ):
        stand.validity = (INVALID, found)
        assert talk(stand, job(folder), LOAD)[-1][0]["refused"] == f"TensorRT does not take {folder / PLAN}: {says}"
    assert stand.done == []
    stand.validity = ("SUBOPTIMAL", 0)
    assert talk(stand, job(folder), LOAD)[-1][0] == {"loaded": ["model"]}


@each_api
def test_a_plan_that_tensorrt_does_not_take_is_said(api, tmp_path: Path) -> None:
    folder, stand = make_engine(tmp_path / "out"), stand_for(api)
    stand.deserialises = False
    assert "build it again, with this version, for this GPU" in talk(stand, job(folder), LOAD)[-1][0]["refused"]


@each_api
def test_too_little_memory_is_said_with_what_is_needed(api, tmp_path: Path) -> None:
    folder, stand = make_engine(tmp_path / "out"), stand_for(api)
    stand.contexts = False
    assert "needs 3.00 GB beside its weights" in talk(stand, job(folder), LOAD)[-1][0]["refused"]


@each_api
def test_an_engine_of_other_inputs_is_refused(api, tmp_path: Path) -> None:
    folder, stand = make_engine(tmp_path / "out"), stand_for(api)
    stand.kinds["input_ids"] = "INT32"
    said = talk(stand, job(folder), LOAD)[-1][0]["refused"]
    assert said == "model.plan has input_ids as int32, recorded is int64: build it again"


def test_every_recorded_api_has_what_we_and_polygraphys_runner_call() -> None:
    """Of the names that it has no other for."""
    used = {
        "ICudaEngine": [
            "num_io_tensors",
            "get_tensor_name",
            "get_tensor_mode",
            "get_tensor_dtype",
            "is_shape_inference_io",
        ],
        "IExecutionContext": [
            *("engine", "execute_async_v3", "get_tensor_address", "get_tensor_shape", "set_input_shape"),
            *("set_tensor_address", "set_output_allocator", "set_optimization_profile_async", "nvtx_verbosity"),
        ],
        "IPluginRegistry": ["all_creators", "load_library"],
    }
    # The builder is asked to keep fp32 what it is.
    used["BuilderFlag"] = ["TF32"]
    for api in APIS:
        assert {c: sorted({*names} - {*api["classes"][c]}) for c, names in used.items()} == {c: [] for c in used}
