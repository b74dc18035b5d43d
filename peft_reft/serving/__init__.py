"""LoReFT adapters in vLLM: a plugin that edits hidden states request by request, many adapters in one batch.

`pip install "peft-reft[vllm]"` registers it; vLLM calls `register` in each of its processes. Adapters are named at the
start (`--additional-config '{"loreft": {"adapters": {"emoji": "PATH"}}}'`) or while serving (`add_adapter`,
`remove_adapter`); a request chooses one by name (`SamplingParams(extra_args={"loreft": "emoji"})`, over HTTP
`"vllm_xargs": {"loreft": "emoji"}`). See docs/serving.md.

============== =========================================================== ==========
module         its one job                                                 runs in
============== =========================================================== ==========
`options`      `additional_config["loreft"]`, checked                      everywhere
`adapters`     read an adapter as a served model needs it                  worker
`turns`        where prompts end; who shares cached blocks                 everywhere
`schedule`     which tokens of a step which weights edit (NumPy)           worker
`tables`       weights of all adapters of one module, stacked (torch)      worker
`edits`        hook of a module, operation in compiled graphs              worker
`server`       slots of adapters; what each step edits                     worker
`worker`       all that put into vLLM's worker                             worker
`core`         adding, dropping; which requests use an adapter             core
`frontend`     names checked, cache salted; `add_adapter` and its like     front end
`endpoints`    the same over HTTP                                          API server
============== =========================================================== ==========
"""

from __future__ import annotations

from .frontend import add_adapter, add_adapter_async, list_adapters, remove_adapter, remove_adapter_async
from .plugin import register

__all__ = [
    "add_adapter",
    "add_adapter_async",
    "list_adapters",
    "register",
    "remove_adapter",
    "remove_adapter_async",
]
