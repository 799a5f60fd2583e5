"""What a client is told of an edit that was not made: a status, one sentence, OpenAI's shape."""

from __future__ import annotations

import math
import re
from typing import Any

from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.service import (
    Cancelled,
    DeadlineExceeded,
    QueueFull,
    Unavailable,
    UnknownModel,
)

# Options of the commands, in the library's sentences, and the fields that stand for them here.
_FIELDS = {
    "--image": "image",
    "--size": "size",
    "--steps": "num_inference_steps",
    "--true-cfg-scale": "true_cfg_scale",
    "--guidance": "guidance_scale",
    "--negative-prompt": "negative_prompt",
    "--policy": "policy",
    "--pipeline": "the server's --pipeline",
}
_OPTION = re.compile("|".join(rf"(?<![\w-]){option}(?![\w-])" for option in _FIELDS))
_STATUS: tuple[tuple[type[BaseException], int, str], ...] = (
    (QueueFull, 429, "queue_full"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (Unavailable, 503, "unavailable"),
    (UnknownModel, 404, "model_not_found"),
    (Cancelled, 499, "cancelled"),
    (UsageError, 400, "invalid_value"),
)


class Refusal(Exception):  # noqa: N818
    """Refuses a request with a status.

    Attributes:
        status: of HTTP.
        code: a word for programs.
        field: that is wrong, or none.
        retry_after_s: seconds after which to try again, or none.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        after = self.retry_after_s
        return {} if after is None else {"Retry-After": str(max(1, math.ceil(after)))}

    def content(self) -> dict[str, Any]:
        """The answer's body, in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": "rate_limit_error" if self.status == 429 else kind,
                "param": self.field,
                "code": self.code,
            }
        }


def refusal_of(error: BaseException) -> Refusal:
    """The refusal that an error of the service or the library means."""
    if isinstance(error, Refusal):
        return error
    message = _OPTION.sub(lambda match: _FIELDS[match[0]], str(error))
    after = error.retry_after_s if isinstance(error, QueueFull) else None
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return Refusal(status, code, message, retry_after_s=after)
    if isinstance(error, DitrimError):
        return Refusal(500, "failed", message)
    return Refusal(500, "internal", f"internal error: {type(error).__name__}")
