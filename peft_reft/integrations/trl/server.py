"""A server of vLLM (`vllm_mode="server"`): requests name the policy as their model.

TRL makes a client of the server, which joins a group of processes by NCCL and sends all weights. While it does so,
`VLLMClient` means a subclass. It needs no such group: it sends the adapter's files over HTTP, and its requests name
the adapter. So nobody who generates with the trainer's client gets the base model's answers by mistake.
"""

from __future__ import annotations

import json
import shlex
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from typing import Any

from ...edits.formulas import INTERVENTIONS
from ...patching import replaced
from ...serving import AdapterFiles
from ...serving.options import KEY, PROMPT_LENGTH
from ...serving.schedule import ServedPlan
from ...tuner.layer import LoReftLayer
from .colocated import dtype_of
from .policy import Policy
from .turns import Histories

_SEND = "/v1/loreft_adapters"
_DROP = "/v1/unload_loreft_adapter"


class Served:
    """The way of the adapter to a server. Only the main process has a client."""

    def __init__(self, generation: Any) -> None:
        self.generation = generation

    def send(self, files: AdapterFiles) -> None:
        """Replace the adapter in the server. Cached blocks that the earlier one has edited are not found again."""
        if self.generation.accelerator.is_main_process:
            self.generation.vllm_client.send(files)


def start(inner: Callable[[Any], None], generation: Any, policy: Policy) -> Served:
    """Make the client, and send the adapter for the first time: whatever is wrong is said before training begins.

    Args:
        inner: TRL's `VLLMGeneration._init_vllm`.
        generation: its instance.
        policy: the adapter that is trained.

    Raises:
        RuntimeError: the server cannot take the adapter. The message says how to start it.
    """
    from trl.generation import vllm_generation

    files = policy.files(generation)  # on all processes
    make = partial(client_class(), policy, files, dtype_of(generation))
    with replaced(vllm_generation, "VLLMClient", make):
        inner(generation)
    return Served(generation)


@cache
def client_class() -> Any:
    """The subclass of TRL's `VLLMClient`."""
    from trl.generation.vllm_client import VLLMClient

    class RolloutClient(VLLMClient):
        """A client whose requests have the policy."""

        model: str
        base: str

        def __init__(self, policy: Policy, files: AdapterFiles, dtype: str, **trl: Any) -> None:
            super().__init__(**trl)
            self.policy = policy
            self.files = files
            self.dtype = dtype
            self.histories = Histories()
            # Of this run alone: several may train on one server.
            self.base, self.model = self.model, f"policy-{uuid.uuid4().hex[:12]}"

        def init_communicator(self, device: Any = 0) -> None:
            """Send the adapter for the first time. TRL joins the group here by which it sends weights."""
            self.send(self.files)
            weakref.finalize(self, _drop, self.base_url, self.model)

        def send(self, files: AdapterFiles) -> None:
            """Load the adapter into the server, or replace it there.

            Raises:
                RuntimeError: the server did not take it.
            """
            answer = self.session.post(
                self.base_url + _SEND,
                data={"name": self.model, "load_inplace": "true"},
                files={"config": ("adapter_config.json", files.config), "weights": ("adapter", files.weights)},
            )
            if answer.status_code in (404, 405):
                self._refuse("has no route that takes LoReFT adapters")
            if answer.status_code != 200:
                self._refuse(f"did not take the LoReFT adapter ({answer.status_code}, {answer.text})")

        def _refuse(self, message: str) -> None:
            command = start_command(self.policy, self.base, self.dtype)
            raise RuntimeError(f"The vLLM server at {self.base_url} {message}. To start one that does:\n{command}")

        # TRL gives all but the first by name.
        def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, prompts: Any, features: Any = None, n: int = 1, *, generation_kwargs: Any = None, **more: Any
        ) -> dict[str, Any]:
            """See `VLLMClient.generate`."""
            ask = partial(super().generate, n=n, **more)
            lengths: Sequence[int | None] = [None] * len(prompts)
            follows = not self.policy.config.response_template and not any(isinstance(each, str) for each in prompts)
            if follows:
                lengths = self.histories.prompt_lengths(prompts)
            found = _in_groups(ask, prompts, features, lengths, n, dict(generation_kwargs or {}))
            if follows:
                for number, answer in enumerate(found["completion_ids"]):
                    self.histories.note(prompts[number // n], answer, lengths[number // n])
            return found

    return RolloutClient


def _in_groups(
    ask: Callable[..., dict[str, Any]],
    prompts: Sequence[Any],
    features: Sequence[Any] | None,
    lengths: Sequence[int | None],
    n: int,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Ask for all prompts of one `loreft_prompt_length` in one request: a request says it once for all its prompts."""
    if None in lengths:  # then all are
        return ask(prompts, features=features, generation_kwargs=kwargs)
    groups: dict[int | None, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    where = "vllm_xargs" if features is None else "extra_args"  # of /v1/completions, of /inference/v1/generate

    def ask_for(length: int | None) -> dict[str, Any]:
        return ask(
            [prompts[number] for number in groups[length]],
            features=None if features is None else [features[number] for number in groups[length]],
            generation_kwargs={**kwargs, where: {PROMPT_LENGTH: length, **(kwargs.get(where) or {})}},
        )

    with ThreadPoolExecutor(max_workers=min(64, len(groups))) as executor:
        answers = [*executor.map(ask_for, groups)]
    of_prompt: dict[int, tuple[dict[str, Any], int]] = {}
    for answer, numbers in zip(answers, groups.values()):
        of_prompt.update({number: (answer, place) for place, number in enumerate(numbers)})
    ordered = [of_prompt[number] for number in range(len(prompts))]
    found: dict[str, Any] = {"prompt_ids": [answer["prompt_ids"][place] for answer, place in ordered]}
    for key in answers[0].keys() - {"prompt_ids"}:  # `n` of each for a prompt; None if they were not asked for
        each = [answer[key][place * n : (place + 1) * n] for answer, place in ordered if answer[key] is not None]
        found[key] = [value for values in each for value in values] if each else None
    return found


def _drop(base_url: str, name: str) -> None:
    """Make room in the server when the client is gone."""
    import requests

    with suppress(requests.RequestException):
        requests.post(base_url + _DROP, json={"loreft_name": name}, timeout=10)


def start_command(policy: Policy, model: str, dtype: str) -> str:
    """The command by which a server starts that serves the policy."""
    plans: list[ServedPlan] = []
    for module in policy.model.modules():
        if isinstance(module, LoReftLayer) and policy.name in module.plans:
            plan = module.plans[policy.name]
            plans.append(ServedPlan(plan.groups, plan.sharing))
    ranks = policy.config.r.values() if isinstance(policy.config.r, dict) else [policy.config.r]
    has_rank = INTERVENTIONS[policy.config.intervention].has_rank
    options = {
        "max_rank": max(ranks) if has_rank else 1,
        "max_positions": max(plan.sets for plan in plans),
        "edit_answers": any(plan.edits_answers for plan in plans),
    }
    given = shlex.quote(json.dumps({KEY: options}))
    return (
        f"VLLM_PLUGINS=loreft VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.quote(model)} --dtype {dtype} "
        f"--logprobs-mode processed_logprobs --additional-config {given}"
    )
