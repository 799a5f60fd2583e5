"""`EditService`: exact results, a bounded queue, cancellation, deadlines, failures."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditrim
import ditrim.plugins.errors
from ditrim.plugins.errors import BackendError, DeviceError, UsageError
from ditrim.runtime.editing.pipelines import prepare_request, run_edit
from ditrim.runtime.policy_text import policy_from_text
from ditrim.runtime.service import (
    Cancelled,
    DeadlineExceeded,
    DeviceFailed,
    EditJob,
    EditService,
    ModelSource,
    QueueFull,
    ServiceError,
    Unavailable,
    UnknownModel,
)
from ditrim.runtime.small_editor import load_small_pipeline

Jobs = Callable[..., EditJob]
Start = Callable[..., EditService]
POLICIES = ("topi tau=0.7 interval=2", "full", "coverage ratio=0.5", "random ratio=0.5 cache=0.2")


def alone(job: EditJob, engines: Any = None) -> Image.Image:
    """The same edit through `attach`, with nothing beside it."""
    pipe = load_small_pipeline()
    choice = policy_from_text(job.policy)
    with ditrim.attach(pipe, engines, choice.policy, cache=choice.cache) as attachment:
        engine_set = attachment.transformer.denoiser.engines.engine_set
        return run_edit(pipe, prepare_request(pipe, engine_set, job.edit))


def test_edits_side_by_side_are_those_of_single_runs_to_the_bit(started: Start, job: Jobs) -> None:
    service = started(workers=3)
    jobs = [job(seed=seed, policy=POLICIES[seed % 4]) for seed in range(8)]
    handles = [service.submit(one) for one in jobs]
    for one, handle in zip(jobs, handles, strict=True):
        result = handle.result(120)
        assert np.array_equal(np.asarray(result.image), np.asarray(alone(one)))
        assert len(result.report.steps) == 4
        assert result.edit.steps == 4
    metrics = service.metrics()
    assert metrics.outcomes == {"ok": 8}
    assert sum(metrics.calls_by_role.values()) == 32
    assert metrics.stage_seconds["text"].count == 8
    assert (metrics.queue_length, metrics.running) == (0, 0)


def test_an_engine_set_serves_as_it_does_alone(
    started: Start, job: Jobs, small_engine_set: Path
) -> None:
    service = started(str(small_engine_set), workers=2, warm_up=True)
    assert service.metrics().warmup_seconds["default"] > 0
    assert service.metrics().calls_by_role == {}  # the warm-up counts to nothing else
    jobs = [job(seed=seed, policy=POLICIES[seed]) for seed in range(2)]
    handles = [service.submit(one) for one in jobs]
    for one, handle in zip(jobs, handles, strict=True):
        image = handle.result(120).image
        assert np.array_equal(np.asarray(image), np.asarray(alone(one, small_engine_set)))


def test_progress_brings_every_step_in_order(started: Start, job: Jobs) -> None:
    told: list[Any] = []
    started().submit(job(policy="topi interval=2"), told.append).result(60)
    assert [progress.phase for progress in told] == ["started"] + ["step"] * 4
    assert [progress.done for progress in told[1:]] == [1, 2, 3, 4]
    assert [progress.role for progress in told[1:]] == ["anchor", "reduced"] * 2
    assert told[2].kept < 1


def test_a_full_queue_refuses_and_says_when_to_come_back(
    started: Start, job: Jobs, gate: Any
) -> None:
    service = started(queue_size=1)
    first = service.submit(job(), gate)
    assert gate.reached.wait(60)
    second = service.submit(job(seed=1))
    with pytest.raises(QueueFull, match="1 edits run and 1 wait") as caught:
        service.submit(job(seed=2))
    assert caught.value.retry_after_s >= 1
    with pytest.raises(UsageError, match="3 edits at once are more than this service's 2 places"):
        service.submit_all([job()] * 3)
    gate.open()
    assert first.result(60).image.size == second.result(60).image.size
    assert service.metrics().refused == {"queue_full": 1}


def test_several_edits_are_accepted_together_or_not_at_all(
    started: Start, job: Jobs, gate: Any
) -> None:
    service = started(queue_size=2)
    service.submit(job(), gate)
    assert gate.reached.wait(60)
    service.submit(job())
    with pytest.raises(QueueFull):
        service.submit_all([job(), job()])
    assert service.metrics().queue_length == 1


def test_cancelling_frees_the_worker_after_the_present_step(
    started: Start, job: Jobs, gate: Any
) -> None:
    service = started()
    running = service.submit(job(steps=40), gate)
    waiting = service.submit(job())
    following = service.submit(job(seed=3))
    assert gate.reached.wait(60)
    assert waiting.cancel()
    assert service.metrics().queue_length == 1
    assert running.cancel()
    assert not running.cancel()
    with pytest.raises(Cancelled):
        running.result(0)
    gate.open()
    assert np.array_equal(np.asarray(following.result(60).image), np.asarray(alone(job(seed=3))))
    assert gate.steps == 1
    assert service.metrics().outcomes == {"cancelled": 2, "ok": 1}


def test_a_deadline_ends_what_waits_and_what_runs(started: Start, job: Jobs, gate: Any) -> None:
    service = started()
    running = service.submit(job(steps=40), gate)
    assert gate.reached.wait(60)
    waiting = service.submit(job(deadline_s=0.05))
    with pytest.raises(DeadlineExceeded, match="while it waited"):
        waiting.result(60)
    running.cancel()
    gate.open()
    slow = service.submit(job(steps=1000, deadline_s=0.5))
    with pytest.raises(DeadlineExceeded):
        slow.result(60)
    assert service.submit(job()).result(60).seconds > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "\udcff"}, "the prompt is not valid UTF-8"),
        ({"images": ()}, "at least one picture"),
        ({"policy": "nothing"}, "nothing"),
        ({"policy": "topi tau=2"}, "tau"),
        ({"cache": "much"}, "a step cache is a threshold"),
        ({"policy": "topi cache=0.1", "cache": "0.1"}, "names a step cache already"),
        ({"guidance": 3.0}, "no guidance embeddings"),
        ({"negative_prompt": "dark"}, "has no effect at a true-cfg-scale of 1"),
        ({"steps": 1001}, "this service runs 1 to 1000"),
        ({"lora": "style"}, "has no LoRA 'style'; it has: none"),
        ({"mask": Image.new("L", (48, 47))}, "the mask is 48x47 pixels"),
        ({"policy": "tomesd", "keep_region": Image.new("L", (72, 72), 255)}, "takes no region"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(
    service: EditService, job: Jobs, changes: dict[str, Any], sentence: str
) -> None:
    before = service.metrics().accepted
    with pytest.raises(UsageError, match=sentence):
        service.submit(job(**changes))
    assert service.metrics().accepted == before


@pytest.fixture(scope="module")
def service() -> Any:
    from ditrim.runtime.service import ServiceOptions

    source = ModelSource(engine="torch", pipeline="small", device="cpu")
    with EditService(source, ServiceOptions(warm_up=False)) as service:
        yield service


def test_an_unknown_model_is_refused_by_name(service: EditService, job: Jobs) -> None:
    with pytest.raises(UnknownModel, match="there is no model 'other'; served are: default"):
        service.submit(job(model="other"))


def test_a_region_holds_for_its_own_edit_only(service: EditService, job: Jobs) -> None:
    region = Image.new("L", (72, 72), 255)
    policy = "topi ratio=0.3 interval=2"
    plain = service.submit(job(policy=policy))
    kept = service.submit(job(policy=policy, keep_region=region))
    again = service.submit(job(policy=policy))
    assert plain.result(60).report.kept_ratio < 0.5
    assert kept.result(60).report.kept_ratio > 0.9
    assert np.array_equal(np.asarray(again.result(60).image), np.asarray(plain.result(60).image))


class AcceleratorError(RuntimeError):
    """Named as torch's own, which cannot be had without a device."""


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: an illegal memory access was encountered"),
        Exception("CUDA failure 700: an illegal memory access"),  # as ONNX Runtime says it
        DeviceError("tensorrt could not run the back plan: illegal memory access"),
    ],
)
def test_a_device_error_ends_its_edit_and_the_service(
    started: Start, job: Jobs, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    service = started(queue_size=4)
    model = service.loaded("default")
    assert model is not None
    run, calls = model.engines.run, []

    def broken(role: str, inputs: Any, outputs: Any) -> None:
        calls.append(role)
        if len(calls) == 4:
            raise error
        run(role, inputs, outputs)

    monkeypatch.setattr(model.engines, "run", broken)
    first, second = service.submit_all([job(), job()])
    with pytest.raises(DeviceFailed, match="illegal memory access"):
        first.result(60)
    with pytest.raises(Unavailable, match="restart it"):
        second.result(60)
    assert service.state == "failed"
    with pytest.raises(Unavailable, match="its device failed"):
        service.submit(job())


class Seen:
    """What a service says of itself at the moment in which an edit is seen to end."""

    def __init__(self, service: EditService) -> None:
        self._service = service
        self.states: list[tuple[str, str]] = []
        self.metrics: list[Any] = []

    def watch(self, handle: Any) -> None:
        # Right where whoever waits is woken: nothing of this thread can run between.
        publish = {name: getattr(handle.future, name) for name in ("set_result", "set_exception")}

        def seen(name: str, value: Any) -> None:
            self.states.append(self._service.status)
            self.metrics.append(self._service.metrics())
            publish[name](value)

        for name in publish:
            setattr(handle.future, name, partial(seen, name))


def test_whoever_has_a_device_error_finds_the_service_failed(
    started: Start, job: Jobs, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = started()
    handles = [service.submit(job(), gate), service.submit(job())]
    seen = Seen(service)
    for handle in handles:
        seen.watch(handle)
    assert gate.reached.wait(60)
    model = service.loaded("default")
    assert model is not None

    def broken(*_: Any) -> None:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(model.engines, "run", broken)
    gate.open()
    for handle in handles:
        with pytest.raises(ServiceError):
            handle.result(60)
    assert [state for state, _ in seen.states] == ["failed"] * 2
    assert all("its device failed" in reason for _, reason in seen.states)


def test_whoever_has_an_answer_finds_it_counted_and_its_place_free(
    started: Start, job: Jobs, gate: Any
) -> None:
    service = started(queue_size=2)
    handles = [service.submit(job(), gate), service.submit(job()), service.submit(job())]
    seen = Seen(service)
    for handle in handles:
        seen.watch(handle)
    assert gate.reached.wait(60)
    handles[1].cancel()
    gate.open()
    assert handles[0].result(60).image.size == handles[2].result(60).image.size
    told = [(one.outcomes, one.queue_length, one.running) for one in seen.metrics]
    assert told[0] == ({"cancelled": 1}, 1, 1)
    assert told[1][0] == {"cancelled": 1, "ok": 1}
    assert told[2] == ({"cancelled": 1, "ok": 2}, 0, 0)
    assert sum(seen.metrics[2].calls_by_role.values()) == 8


def test_draining_ends_only_when_every_end_can_be_seen(
    started: Start, job: Jobs, gate: Any
) -> None:
    service = started()
    handle = service.submit(job(), gate)
    assert gate.reached.wait(60)
    drained: list[bool] = []
    publish = handle.future.set_result

    def seen(result: Any) -> None:
        drained.append(service.drain(timeout=0.05))
        publish(result)

    handle.future.set_result = seen  # type: ignore[method-assign]
    gate.open()
    assert handle.result(60)
    assert drained == [False]
    assert service.drain(60)


def test_closing_while_an_edit_ends_in_a_device_error_ends_every_thread(
    started: Start, job: Jobs, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = started()
    model = service.loaded("default")
    assert model is not None
    handle = service.submit(job(deadline_s=600.0), gate)
    assert gate.reached.wait(60)

    def broken(*_: Any) -> None:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(model.engines, "run", broken)
    monkeypatch.setattr(handle, "check", lambda: None)  # it gets as far as the device
    closing = threading.Thread(target=service.close, daemon=True)
    closing.start()
    while service.state != "closed":
        closing.join(0.01)
    gate.open()
    closing.join(60)
    assert not closing.is_alive()
    assert service.state == "closed"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no"),
        MemoryError(),
        KeyError("x"),
        Exception("CUDA failure 2: out of memory"),  # as ONNX Runtime says it
        BackendError("no memory for the activations of the back plan"),
    ],
)
def test_another_failure_ends_its_edit_alone(
    started: Start, job: Jobs, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    service = started()
    model = service.loaded("default")
    assert model is not None
    with monkeypatch.context() as patch:
        patch.setattr(model.engines, "run", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(ditrim.plugins.errors.DitrimError, match=r"memory|KeyError"):
            service.submit(job()).result(60)
    assert service.state == "ready"
    result = service.submit(job(seed=5)).result(60)
    assert np.array_equal(np.asarray(result.image), np.asarray(alone(job(seed=5))))


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(
    started: Start, job: Jobs, gate: Any
) -> None:
    service = started()
    handles = [service.submit(job(), gate), service.submit(job(seed=1))]
    assert gate.reached.wait(60)
    assert not service.drain(timeout=0.05)
    with pytest.raises(Unavailable, match="it is shutting down"):
        service.submit(job())
    gate.open()
    assert service.drain(60)
    assert all(handle.done() and handle.result(0) for handle in handles)


def test_closing_ends_what_is_left(started: Start, job: Jobs, gate: Any) -> None:
    service = started()
    handles = [service.submit(job(steps=40), gate), service.submit(job())]
    assert gate.reached.wait(60)
    gate.open()
    service.close()
    for handle in handles:
        with pytest.raises(Unavailable, match="was closed"):
            handle.result(60)
    assert service.state == "closed"


def test_a_model_that_cannot_be_loaded_says_so_at_the_start(tmp_path: Path) -> None:
    service = EditService(str(tmp_path / "none"))
    with pytest.raises(ditrim.plugins.errors.EngineSetError, match="does not exist"):
        service.start()
    assert service.state == "failed"
    service.close()


def test_models_beyond_the_bound_make_room_for_each_other(started: Start, job: Jobs) -> None:
    source = ModelSource(engine="torch", pipeline="small", device="cpu")
    service = started({"a": source, "b": copy.copy(source)}, max_loaded=1)
    assert service.metrics().loaded == ("a",)
    images = [service.submit(job(model=name)).result(60).image for name in ("a", "b", "a")]
    assert all(np.array_equal(np.asarray(image), np.asarray(images[0])) for image in images)
    metrics = service.metrics()
    assert (metrics.loaded, metrics.loads, metrics.evictions) == (("a",), 3, 2)
