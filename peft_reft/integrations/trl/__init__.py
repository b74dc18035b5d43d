"""TRL's rollouts in vLLM (`use_vllm=True`) with LoReFT: the adapter alone is sent, and requests name it.

TRL merges an adapter into the weights, sends all of them to vLLM, and drops its prefix cache. Edits of chosen
tokens cannot be merged. After `rollouts_in_vllm()` a trainer whose model has a LoReFT adapter sends that adapter's
files, some hundred KB, to this package's plugin in vLLM (`serving/`). All other trainers do what TRL does.

============ ==============================================================================================
module       its one job
============ ==============================================================================================
`start`      wraps TRL's `VLLMGeneration`, which all of its trainers use that generate with vLLM, but for online DPO
`policy`     the adapter that is trained: whether an engine can serve it, and its files
`base`       whether the base model is still the one that the engine loads from disk
`turns`      where the prompt of a request ends that goes on behind the result of a tool
`colocated`  the engine in the trainer's own process (`vllm_mode="colocate"`)
`server`     a server of vLLM (`vllm_mode="server"`)
============ ==============================================================================================
"""

from __future__ import annotations

from .start import rollouts_in_vllm

__all__ = ["rollouts_in_vllm"]
