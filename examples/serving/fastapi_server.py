"""OpenAI's embeddings API with a size per request: `MODEL=out/quickstart uvicorn fastapi_server:app --port 8000`.

A request may have `num_layers` and `prompt_name` beside OpenAI's `input`, `model`, `dimensions` and `encoding_format`.
"""

import base64
import os
import threading
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StrictInt
from transformers import AutoModel

NAME = os.environ.get("SERVED_MODEL_NAME") or os.path.basename(os.path.normpath(os.environ["MODEL"]))
model = AutoModel.from_pretrained(os.environ["MODEL"], trust_remote_code=True).eval()
one_at_a_time = threading.Lock()  # a fast tokenizer cannot be used by two threads at once
app = FastAPI()
Text = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(BaseModel):
    """The body of a request."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    model: str
    dimensions: StrictInt | None = None
    encoding_format: Literal["float", "base64"] = "float"
    num_layers: StrictInt | None = None
    prompt_name: str | None = None


@app.post("/v1/embeddings")
def embeddings(request: EmbeddingRequest):
    """Embed one text or several at the size that the request names."""
    if request.model != NAME:
        return error(404, f"the model {request.model!r} does not exist; this server has {NAME!r}", "model")
    texts = [request.input] if isinstance(request.input, str) else request.input
    with one_at_a_time:
        try:
            prompt = model.find_prompt(name=request.prompt_name)
            vectors = model.encode(texts, request.num_layers, request.dimensions, prompt=prompt)
        except ValueError as problem:  # "dim: 999 is not allowed; this model has 1 to 384"
            argument, _, reason = str(problem).partition(": ")
            argument = {"dim": "dimensions"}.get(argument, argument)
            return error(400, f"{argument}: {reason}", argument)
        ids = model.tokenizer([prompt + text for text in texts], truncation=True, max_length=model.max_length)
    as_base64 = request.encoding_format == "base64"
    rows = [base64.b64encode(v.astype("<f4").tobytes()).decode() if as_base64 else v.tolist() for v in vectors]
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    tokens = sum(map(len, ids["input_ids"]))
    return {"object": "list", "model": NAME, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


@app.get("/v1/models")
def models():
    """The one model of this server."""
    return {"object": "list", "data": [{"id": NAME, "object": "model", "created": 0, "owned_by": "local"}]}


@app.exception_handler(RequestValidationError)
def wrong_body(_: Request, problem: RequestValidationError):
    """A body that is not JSON, or has a wrong or missing field."""
    first = problem.errors()[0]
    argument = str(first["loc"][1]) if len(first["loc"]) > 1 else "body"
    return error(400, f"{argument}: {first['msg']}", argument)


def error(status: int, message: str, param: str) -> JSONResponse:
    """An error as OpenAI's API has it."""
    code = "model_not_found" if status == 404 else None
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": body}, status)
