"""`POST /v1/images/edits` over a real server: results, refusals, limits, clients that leave."""

from __future__ import annotations

import base64
import io
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

import ditrim
from ditrim.runtime.editing.pipelines import EditRequest, run_edit
from ditrim.runtime.policy_text import policy_from_text
from ditrim.runtime.small_editor import load_small_pipeline

URL = "/v1/images/edits"
PROMPT = "take away the black ring"


def post(client: Any, png: bytes, **fields: Any) -> httpx.Response:
    data = {"prompt": PROMPT, "num_inference_steps": "4"} | {k: str(v) for k, v in fields.items()}
    response: httpx.Response = client.post(URL, data=data, files={"image": png})
    return response


def pixels(b64: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def alone(png: bytes, seed: int, policy: str = "topi", steps: int = 4) -> Any:
    """The same edit through `attach`."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    pipe = load_small_pipeline()
    request = EditRequest(images=(image,), prompt=PROMPT, steps=steps, seed=seed)
    with ditrim.attach(pipe, policy=policy_from_text(policy).policy):
        return np.asarray(run_edit(pipe, request))


def test_concurrent_edits_are_those_of_single_runs_to_the_bit(client: Any, png: bytes) -> None:
    policies = ("topi tau=0.7 interval=2", "full", "coverage ratio=0.5")
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda i: post(client, png, seed=i, policy=policies[i % 3]), range(12))
        )
    for seed, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["seed"] == seed
        assert told["size"] == "48x48"
        assert told["seconds"] > 0
        expected = alone(png, seed, policies[seed % 3])
        assert np.array_equal(pixels(told["data"][0]["b64_json"]), expected)


def test_n_pictures_have_the_seeds_that_follow(client: Any, png: bytes) -> None:
    told = post(client, png, seed=7, n=3, report="true").json()
    assert [entry["seed"] for entry in told["data"]] == [7, 8, 9]
    assert np.array_equal(pixels(told["data"][2]["b64_json"]), alone(png, 9))
    report = told["data"][0]["report"]
    assert sum(report["calls_by_role"].values()) == 4
    assert 0 < report["kept_ratio"] <= 1


def test_json_gives_what_a_form_gives(client: Any, png: bytes) -> None:
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    body = {"prompt": PROMPT, "images": [{"image_url": url}], "seed": 3, "num_inference_steps": 4}
    answer = client.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), alone(png, 3))


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"output_format": "jpeg", "output_compression": 50}, "JPEG"),
        ({"output_format": "webp"}, "WEBP"),
    ],
)
def test_the_picture_has_the_format_that_was_asked_for(
    client: Any, png: bytes, fields: dict[str, Any], form: str
) -> None:
    b64 = post(client, png, seed=1, **fields).json()["data"][0]["b64_json"]
    assert Image.open(io.BytesIO(base64.b64decode(b64))).format == form


def test_a_stream_tells_every_step_and_then_the_picture(client: Any, png: bytes) -> None:
    answer = post(client, png, seed=2, stream="true")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]
    kinds = [event["type"] for event in events]
    assert kinds == ["image_edit.progress"] * 5 + ["image_edit.completed"]
    assert [event["step"] for event in events[:-1]] == [0, 1, 2, 3, 4]
    assert np.array_equal(pixels(events[-1]["b64_json"]), alone(png, 2))


def test_the_openai_client_edits_one_picture_several_and_streamed(client: Any, png: bytes) -> None:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as api:
        extra = {"seed": 4, "num_inference_steps": 4}
        given: dict[str, Any] = {"prompt": PROMPT, "extra_body": extra}
        one = api.images.edit(image=("a.png", png), **given)
        assert np.array_equal(pixels(one.data[0].b64_json), alone(png, 4))
        several = api.images.edit(image=[("a.png", png), ("b.png", png)], n=2, **given)
        assert len(several.data) == 2
        events = list(api.images.edit(image=("a.png", png), stream=True, **given))
        assert events[-1].type == "image_edit.completed"
        assert np.array_equal(pixels(events[-1].b64_json), alone(png, 4))
        with pytest.raises(openai.BadRequestError, match="tau"):
            api.images.edit(
                image=("a.png", png), prompt=PROMPT, extra_body={"policy": "topi tau=2"}
            )


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({"colour": "red"}, 400, "colour is no field"),
        ({"n": 5}, 400, "less than or equal to 4"),
        ({"n": "two"}, 400, "n is 'two'"),
        ({"size": "50x48"}, 400, "the nearest size is 4"),
        ({"size": "4800x4800"}, 400, "tokens"),
        ({"size": "big"}, 400, "neither WxH"),
        ({"seed": -1}, 400, "greater than or equal to 0"),
        ({"policy": "topi tau=2"}, 400, "tau"),
        ({"policy": "auto predictor=/etc/passwd min_psnr=30"}, 400, "names a file"),
        ({"policy": "topi", "preset": "exact"}, 400, "give one of them"),
        ({"preset": "quick"}, 400, "there are: exact"),
        ({"cache": "nan"}, 400, "finite"),
        ({"lora": "style"}, 400, "has no LoRA"),
        ({"guidance_scale": 3}, 400, "guidance_scale 3"),
        ({"negative_prompt": "dark"}, 400, "negative_prompt has no effect"),
        ({"response_format": "url"}, 400, "b64_json"),
        ({"output_compression": 3}, 400, "a png loses nothing"),
        ({"partial_images": 1}, 400, "leave it out"),
        ({"num_inference_steps": 2000}, 400, "1 to 1000"),
        ({"prompt": " "}, 400, "prompt is empty"),
        ({"model": "other"}, 404, "served are: default"),
    ],
)
def test_a_wrong_field_is_refused_before_anything_runs(
    client: Any, png: bytes, fields: dict[str, Any], status: int, word: str
) -> None:
    before = client.service.metrics().accepted
    answer = post(client, png, **fields)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]["message"]
    assert client.service.metrics().accepted == before


def test_wrong_pictures_and_bodies_are_refused(
    client: Any, png: bytes, picture_of: Callable[..., bytes]
) -> None:
    def status(files: Any, **fields: str) -> tuple[int, str]:
        answer = client.post(URL, data={"prompt": PROMPT} | fields, files=files)
        return answer.status_code, answer.json()["error"]["message"]

    clear = picture_of("RGBA", (40, 40))
    cases = [
        ({"image": b"no picture"}, 400, "not a picture"),
        ({"image": png[:200]}, 400, "damaged"),
        ({"image": picture_of("1", (9000, 9000))}, 400, "megapixels"),
        ({"image": picture_of("RGB", (8, 8))}, 400, "at least 16"),
        ({"image": png, "mask": clear}, 400, "both need the same size"),
        ({"image": png, "mask": png}, 400, "no alpha channel"),
        ({"image": png, "mask": picture_of("RGBA", (48, 48))}, 400, "takes no mask"),
        ([("image", png)] * 9, 400, "takes 8"),
        ([("image", png), ("mask", clear), ("mask", clear)], 400, "two masks"),
        ({"other": png}, 400, "other is a file"),
    ]
    for files, expected, word in cases:
        code, message = status(files)
        assert (code, word in message) == (expected, True), (code, message)
    assert client.post(URL, json={"images": ["data:image/png;base64,AAAA"]}).status_code == 422
    assert (
        client.post(URL, json={"images": ["https://host/a.png"], "prompt": "a"}).status_code == 400
    )
    assert (
        client.post(URL, content=b"{", headers={"content-type": "application/json"}).status_code
        == 422
    )
    twice = b'{"prompt": "a", "prompt": "b"}'
    answer = client.post(URL, content=twice, headers={"content-type": "application/json"})
    assert (answer.status_code, "given twice" in answer.text) == (400, True)
    assert client.post(URL, content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get(URL).status_code == 405
    assert client.get("/nothing").json()["error"]["code"] == "not_served"


def test_a_body_that_is_too_large_is_refused(server: Callable[..., Any], png: bytes) -> None:
    client = server({"max_body_bytes": 1000})
    assert post(client, png + b"0" * 2000).status_code == 413

    def chunks() -> Any:
        yield from (b"x" * 600 for _ in range(4))

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post(URL, content=chunks(), headers=headers).status_code in (413, 422)


def test_a_full_queue_is_429_and_a_deadline_504(server: Callable[..., Any], png: bytes) -> None:
    client = server(queue_size=0, max_steps=1000)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(post, client, png, num_inference_steps=1000, timeout=3)
        _until(lambda: client.service.metrics().running == 1)
        full = post(client, png)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert slow.result().status_code == 504
    _until(lambda: client.service.metrics().running == 0)
    assert post(client, png).status_code == 200


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_that_leaves_frees_its_worker(
    server: Callable[..., Any], png: bytes, stream: str
) -> None:
    client = server(max_steps=1000)
    seen: list[int] = []
    for _ in range(3):
        with pytest.raises(httpx.TimeoutException):
            _leave_half_way(client, png, stream)
        _until(lambda: client.service.metrics().running == 0)
        seen.append(post(client, png, seed=1).status_code)
    assert seen == [200] * 3
    assert client.service.metrics().outcomes == {"cancelled": 3, "ok": 3}
    assert np.array_equal(
        pixels(post(client, png, seed=1).json()["data"][0]["b64_json"]), alone(png, 1)
    )


def _leave_half_way(client: Any, png: bytes, stream: str) -> None:
    fields = {"prompt": PROMPT, "num_inference_steps": "1000", "stream": stream}
    sent = client.stream("POST", URL, data=fields, files={"image": png}, timeout=2.0)
    with sent as answer:
        for _ in zip(range(12), answer.iter_lines(), strict=False):
            pass
        raise httpx.ReadTimeout("left")


def _until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_hostile_requests_leave_the_server_alive(client: Any, png: bytes) -> None:
    draw = random.Random(0)
    form = httpx.Request(
        "POST", "http://x", data={"prompt": PROMPT, "n": "9"}, files={"image": png}
    )
    whole, kind = form.read(), form.headers["content-type"]
    kinds = [
        kind,
        "application/json",
        "multipart/form-data",
        kind[:-3],
        "multipart/form-data; boundary=",
    ]
    for _ in range(300):
        body = bytearray(whole)
        for _ in range(draw.randrange(1, 30)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        body = body[: draw.randrange(len(body))] if draw.random() < 0.3 else body
        headers = {"content-type": draw.choice(kinds), "x-request-id": "a\tb"}
        answer = client.post(URL, content=bytes(body), headers=headers)
        assert answer.status_code in (400, 413, 415, 422), answer.text
        assert answer.json()["error"]["message"]
    nested = b'{"prompt":' + b"[" * 100_000
    answer = client.post(URL, content=nested, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert client.get("/health").status_code == 200


def test_health_models_and_metrics_tell_what_happened(client: Any, png: bytes) -> None:
    answer = post(client, png, seed=1)
    assert len(answer.headers["x-request-id"]) == 32
    named = client.get("/health", headers={"x-request-id": "mine"})
    assert (named.status_code, named.headers["x-request-id"]) == (200, "mine")
    assert client.get("/liveness").status_code == 200
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["loaded"], model["backend"]) == ("default", True, "torch")
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['ditrim_http_requests_total{path="/v1/images/edits",status="200"}']) >= 1
    assert float(values['ditrim_stage_seconds_count{stage="front"}']) >= 1
    assert float(values['ditrim_stage_seconds_count{stage="encode"}']) >= 1
    assert float(values['ditrim_calls_total{role="anchor"}']) >= 1
    assert float(values["ditrim_ready"]) == 1


def test_after_a_device_error_health_is_503(server: Callable[..., Any], png: bytes) -> None:
    client = server()
    model = client.service.loaded("default")

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    model.engines.run = broken
    assert post(client, png).status_code == 500
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert post(client, png).status_code == 503
    assert client.get("/liveness").status_code == 200
