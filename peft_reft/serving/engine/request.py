"""A request, as front end, core and worker hold it; and our own attributes of vLLM's objects.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`Request.sampling_params`                                 holds `extra_args`; also of CachedRequestState       0.28
`SamplingParams.extra_args`                               names the adapter                                    0.28
`EngineCoreRequest.prompt_token_ids`                      finds prompts and answers; CachedRequestState too    0.28
`EngineCoreRequest.prompt_embeds`                         the same, for requests without token ids             0.28
`EngineCoreRequest.resumable`                             requests that go on with more input are refused      0.28
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`CachedRequestState.loreft_served`                        what a step must know of a request
`Request.loreft_map`                                      which of a request's tokens are edited
========================================================= ====================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..options import KEY


def keep(owner: object, name: str, value: object) -> None:
    """Keep a value of ours on one of vLLM's objects, for as long as that object lives."""
    setattr(owner, name, value)


def kept(owner: object, name: str) -> Any:
    """What `keep` put there; None if it put nothing there."""
    return vars(owner).get(name)


def extra_args(params: object) -> Mapping[str, Any]:
    """The `extra_args` of sampling parameters; empty for other parameters, such as those of a pooling model."""
    return getattr(params, "extra_args", None) or {}


def adapter_of(request: Any) -> str | None:
    """The name of the adapter that a request has chosen, None for the base model."""
    return extra_args(request.sampling_params).get(KEY)


def token_ids(request: Any) -> Sequence[int] | None:
    """The token ids that a request was given; None if some of what it was given are embeddings."""
    if request.prompt_embeds is not None:
        return None
    ids: Sequence[int] = request.prompt_token_ids
    return ids


def given_length(request: Any) -> int:
    """How many tokens or embeddings a request was given."""
    ids = token_ids(request)
    return len(request.prompt_embeds if ids is None else ids)


def params_of(request: Any) -> object:
    """The sampling parameters of a request; None for a pooling model's."""
    params: object = request.sampling_params
    return params


def add_extra_args(request: Any, more: Mapping[str, object]) -> None:
    """Give a request further `extra_args`. Its parameters are a copy of the user's."""
    request.sampling_params.extra_args = {**extra_args(request.sampling_params), **more}


def is_session(request: Any) -> bool:
    """Whether more input may be added to a request while it runs."""
    resumable: bool = request.resumable
    return resumable
