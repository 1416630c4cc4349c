"""Errors in OpenAI's shape."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from perceiver_ar_jax.serving.schema import Error, ErrorDetail

RETRY_AFTER = "1"  # seconds


class BadRequest(Exception):
    """A request that cannot be answered, why, and which field is to blame."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An answer with an error; 429 and 503 say when to try again."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    error = Error(error=ErrorDetail(message=message, type=kind, param=param, code=code))
    headers = {"Retry-After": RETRY_AFTER} if status in (429, 503) else None
    return JSONResponse(error.model_dump(), status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the app gets this shape."""

    @app.exception_handler(BadRequest)
    async def bad_request(request: Request, error: BadRequest) -> Response:
        status = 404 if error.code == "model_not_found" else 400
        return error_response(status, str(error), param=error.param, code=error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The values are left out: they may be long, or no text at all.
        problems = {}
        for problem in error.errors():
            place = [part for part in problem["loc"][1:2] if isinstance(part, str)]
            problems.setdefault(place[0] if place else "body", problem["msg"])
        message = "; ".join(f"{place}: {reason}" for place, reason in problems.items())
        return error_response(400, _printable(message), param=_printable(next(iter(problems))))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response


def _printable(text):
    return text.encode("utf-8", "replace").decode()[:1000]
