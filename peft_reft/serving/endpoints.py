"""Adapters over HTTP, with routes like vLLM's own for LoRA. Entry point of the group `vllm.endpoint_plugins`.

vLLM adds a plugin's routes only if `VLLM_PLUGINS` names the plugin (`VLLM_PLUGINS=loreft`), because whoever reaches
them can have the server read any folder.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message

from .frontend import add_adapter_async, list_adapters_async, remove_adapter_async
from .sources import AdapterFiles

MOST_BYTES = 2**28
"""How large a body may be that sends an adapter."""
_FORM = (
    "Expected multipart/form-data: a text name, the files config (adapter_config.json) and weights "
    "(adapter_model.safetensors), and load_inplace, if an adapter of this name may be replaced."
)


class LoadLoReftAdapter(BaseModel):
    """Body of `POST /v1/load_loreft_adapter`."""

    loreft_name: str
    loreft_path: str
    load_inplace: bool = False


class UnloadLoReftAdapter(BaseModel):
    """Body of `POST /v1/unload_loreft_adapter`."""

    loreft_name: str


async def load_loreft_adapter(body: LoadLoReftAdapter, request: Request) -> JSONResponse:
    """Load an adapter from a folder or the Hub. With `load_inplace` it may replace the one that has its name."""
    engine = request.app.state.loreft_engine
    try:
        await add_adapter_async(engine, body.loreft_name, body.loreft_path, body.load_inplace)
    except ValueError as error:
        return _refusal(error)
    return JSONResponse({"message": f"Adapter {body.loreft_name!r} is loaded."})


async def send_loreft_adapter(request: Request) -> JSONResponse:
    """Load an adapter whose files are in the body, which is a form: `name`, `config`, `weights`, `load_inplace`."""
    try:
        name, files, replace = await _read_form(request)
        await add_adapter_async(request.app.state.loreft_engine, name, files, replace)
    except ValueError as error:
        return _refusal(error)
    return JSONResponse({"message": f"Adapter {name!r} is loaded."})


async def _read_form(request: Request) -> tuple[str, AdapterFiles, bool]:
    """The name of an adapter that is sent, its files, and whether it may replace the one that has its name.

    Raises:
        ValueError: the body is too large, or no such form.
    """
    size = 0

    async def receive() -> Message:
        nonlocal size
        message: Message = await request.receive()
        size += len(message.get("body", b""))
        if size > MOST_BYTES:
            # Of all exceptions the reader of the form closes its files behind this one alone.
            raise MultiPartException(f"It is too large (allowed: {MOST_BYTES} bytes). Have a folder loaded instead.")
        return message

    try:
        async with Request(request.scope, receive).form() as form:
            return await _read_fields(form)
    except HTTPException as error:
        raise ValueError(f"The body cannot be read: {error.detail} {_FORM}") from error


async def _read_fields(form: FormData) -> tuple[str, AdapterFiles, bool]:
    name, replace = form.get("name"), form.get("load_inplace", "false")
    if not isinstance(name, str):
        raise ValueError(f"name is missing, or no text. {_FORM}")
    if replace not in ("true", "false"):
        raise ValueError(f"load_inplace={replace!r}: expected true or false. {_FORM}")
    unknown = form.keys() - {"name", "config", "weights", "load_inplace"}
    if unknown:
        raise ValueError(f"There is no field {min(unknown)}. {_FORM}")
    contents: list[bytes] = []
    for field in ("config", "weights"):
        part = form.get(field)
        if not isinstance(part, UploadFile):
            raise ValueError(f"{field} is missing, or no file. {_FORM}")
        contents.append(await part.read())
    return name, AdapterFiles(*contents), replace == "true"


async def unload_loreft_adapter(body: UnloadLoReftAdapter, request: Request) -> JSONResponse:
    """Drop an adapter. Requests that run go on with it."""
    try:
        await remove_adapter_async(request.app.state.loreft_engine, body.loreft_name)
    except ValueError as error:
        return _refusal(error)
    return JSONResponse({"message": f"Adapter {body.loreft_name!r} is dropped."})


async def loreft_adapters(request: Request) -> JSONResponse:
    """List the names of the adapters that requests can choose."""
    try:
        names = await list_adapters_async(request.app.state.loreft_engine)
    except ValueError as error:
        return _refusal(error)
    return JSONResponse({"object": "list", "data": [{"id": name, "object": "loreft_adapter"} for name in names]})


def _refusal(error: ValueError) -> JSONResponse:
    details = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
    return JSONResponse({"error": details}, status_code=400)


class Endpoints:
    """The four routes. vLLM's `EndpointPlugin` protocol names the attributes and methods."""

    name = "loreft"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes to vLLM's server."""
        app.add_api_route("/v1/load_loreft_adapter", load_loreft_adapter, methods=["POST"])
        app.add_api_route("/v1/unload_loreft_adapter", unload_loreft_adapter, methods=["POST"])
        app.add_api_route("/v1/loreft_adapters", send_loreft_adapter, methods=["POST"])
        app.add_api_route("/v1/loreft_adapters", loreft_adapters, methods=["GET"])

    async def init_state(self, engine_client: object, state: Any, args: object) -> None:
        """Give the routes the engine (`state` is that of the FastAPI application)."""
        state.loreft_engine = engine_client
