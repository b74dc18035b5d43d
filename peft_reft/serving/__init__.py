"""LoReFT adapters in vLLM: a plugin that edits hidden states request by request, many adapters in one batch.

`pip install "peft-reft[vllm]"` registers the plugin, and vLLM calls `register` in each of its processes. Adapters are
named at the start (`--additional-config '{"loreft": {"adapters": {"emoji": "PATH"}}}'`) or while the engine runs
(`add_adapter`, `remove_adapter`), as a folder or as the content of its files (`AdapterFiles`). A request chooses one
by name (`SamplingParams(extra_args={"loreft": "emoji"})`; over HTTP, `"vllm_xargs": {"loreft": "emoji"}`). See
docs/serving.md.

============== ============================================================= ===============
module         its one job                                                   runs in
============== ============================================================= ===============
`engine`       all that is read, called or replaced of vLLM, with tables     everywhere
`plugin`       puts the functions of the next three into vLLM                everywhere
`frontend`     adds and drops adapters; checks requests                      front end
`finding`      finds adapters that a front end does not know yet             front end
`models`       adapters as models of the OpenAI server                       API server
`offered`      what a front end knows of the adapters                        front end
`core`         says which adapter a name means; block keys                   core
`worker`       hooks the loaded model; prepares each step                    worker
`endpoints`    routes of our own to load and drop adapters                   API server
`options`      `additional_config["loreft"]` and its checks                  everywhere
`sources`      an adapter's files, in a folder, on the Hub or sent           everywhere
`adapters`     reads an adapter for serving                                  worker
`turns`        where prompts and answers are                                 everywhere
`chosen`       what is known of an adapter; what a request has chosen        everywhere
`blocks`       the keys of cached blocks: what is edited in them             front end, core
`schedule`     which tokens of a step are edited, with which weights (NumPy) worker
`tables`       the weights of all adapters of one module, stacked (torch)    worker
`edits`        the hook of a module, and its operation in compiled graphs    worker
`server`       the places of adapters; what each step edits                  worker
`selfcheck`    what an engine of an untested vLLM does before it serves      core, worker
============== ============================================================= ===============
"""

from __future__ import annotations

from .frontend import (
    add_adapter,
    add_adapter_async,
    list_adapters,
    list_adapters_async,
    remove_adapter,
    remove_adapter_async,
)
from .plugin import register
from .sources import AdapterFiles

__all__ = [
    "AdapterFiles",
    "add_adapter",
    "add_adapter_async",
    "list_adapters",
    "list_adapters_async",
    "register",
    "remove_adapter",
    "remove_adapter_async",
]
