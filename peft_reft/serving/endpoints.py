"""Adapters over HTTP, in the manner of vLLM's own for LoRA: entry point of the group `vllm.endpoint_plugins`.

vLLM adds routes of plugins only where they are allowed by name, `VLLM_PLUGINS=loreft`: whoever may call these can have
the server read any folder.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from .frontend import add_adapter_async, list_adapters, remove_adapter_async

router = APIRouter()


class LoadLoReftAdapter(BaseModel):
    """Body of `POST /v1/load_loreft_adapter`."""

    loreft_name: str
    loreft_path: str


class UnloadLoReftAdapter(BaseModel):
    """Body of `POST /v1/unload_loreft_adapter`."""

    loreft_name: str


def _answer(error: Exception | None, done: str) -> JSONResponse:
    if error is None:
        return JSONResponse({"message": done})
    details = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
    return JSONResponse({"error": details}, status_code=400)


@router.post("/v1/load_loreft_adapter")
async def load_loreft_adapter(body: LoadLoReftAdapter, request: Request) -> JSONResponse:
    """Load an adapter from a folder or the Hub."""
    try:
        await add_adapter_async(request.app.state.loreft_engine, body.loreft_name, body.loreft_path)
    except ValueError as error:
        return _answer(error, "")
    return _answer(None, f"Adapter {body.loreft_name!r} is loaded.")


@router.post("/v1/unload_loreft_adapter")
async def unload_loreft_adapter(body: UnloadLoReftAdapter, request: Request) -> JSONResponse:
    """Drop an adapter, as soon as no request uses it."""
    try:
        await remove_adapter_async(request.app.state.loreft_engine, body.loreft_name)
    except ValueError as error:
        return _answer(error, "")
    return _answer(None, f"Adapter {body.loreft_name!r} is dropped.")


@router.get("/v1/loreft_adapters")
async def loreft_adapters(request: Request) -> JSONResponse:
    """Names of the adapters that requests can choose."""
    try:
        names = list_adapters(request.app.state.loreft_engine)
    except ValueError as error:
        return _answer(error, "")
    return JSONResponse({"object": "list", "data": [{"id": name, "object": "loreft_adapter"} for name in names]})


class Endpoints:
    """vLLM's `EndpointPlugin` protocol."""

    name = "loreft"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        if getattr(args, "api_server_count", None) not in (None, 1):
            raise ValueError(
                f"--api-server-count={args.api_server_count}: adapters come and go in one process that requests reach "
                "(allowed: 1), or run without VLLM_PLUGINS=loreft."
            )
        state.loreft_engine = engine_client
