"""Adapters over HTTP, with routes like vLLM's own for LoRA. Entry point of the group `vllm.endpoint_plugins`.

vLLM adds a plugin's routes only if `VLLM_PLUGINS` names the plugin (`VLLM_PLUGINS=loreft`), because whoever reaches
them can have the server read any folder.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from .frontend import add_adapter_async, list_adapters_async, remove_adapter_async


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
    """The three routes. vLLM's `EndpointPlugin` protocol names the attributes and methods."""

    name = "loreft"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes to vLLM's server."""
        app.add_api_route("/v1/load_loreft_adapter", load_loreft_adapter, methods=["POST"])
        app.add_api_route("/v1/unload_loreft_adapter", unload_loreft_adapter, methods=["POST"])
        app.add_api_route("/v1/loreft_adapters", loreft_adapters, methods=["GET"])

    async def init_state(self, engine_client: object, state: Any, args: object) -> None:
        """Give the routes the engine (`state` is that of the FastAPI application)."""
        state.loreft_engine = engine_client
