"""lm-evaluation-harness with a LoReFT adapter: its command, and a model `loreft` that knows where prompts end.

    python examples/lm_eval_loreft.py run --model loreft --tasks arc_easy --model_args pretrained=BASE,peft=ADAPTER

lm-eval's own `hf` model scores a choice by a forward of prompt and choice in one row without a mask. That is right for
chats (`--apply_chat_template`) if the adapter knows the headers of its chat template. For plain text it is not: the
last tokens of the "prompt" would be those of the choice, or padding. `loreft` is that model, and says which tokens the
prompt has. For tasks that generate (`generate_until`), and for prefixes alone (f5), the two are the same.
"""

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from peft_reft import DataCollatorForLoReft


@register_model("loreft")
class LoReftLM(HFLM):
    """lm-eval's `hf`, `peft=` being a LoReFT adapter."""

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        self._prompt_lengths: dict[tuple[int, ...], int] = {}
        for _, context, continuation in requests:
            row = (context + continuation)[-(self.max_length + 1) : -1]
            prompt = max(1, len(row) + 1 - len(continuation))
            if self._prompt_lengths.setdefault(tuple(row), prompt) != prompt:
                raise ValueError(
                    f"One row with prompts of {self._prompt_lengths[tuple(row)]} and {prompt} tokens: {row}"
                )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        labels, mask = torch.full_like(inps, -100), torch.zeros_like(inps)
        lengths = sorted({len(row) for row in self._prompt_lengths}, reverse=True)
        for n, row in enumerate(inps.tolist()):  # padded on the right, with zeros
            length = next(k for k in lengths if tuple(row[:k]) in self._prompt_lengths and not any(row[k:]))
            prompt = self._prompt_lengths[tuple(row[:length])]
            mask[n, :length] = 1
            labels[n, prompt:length] = inps[n, prompt:length]
        config = self.model.peft_config[self.model.active_adapter]
        batch = {"input_ids": inps, "attention_mask": mask, "labels": labels}
        batch = DataCollatorForLoReft(lambda rows: batch, config)([])
        del batch["labels"]
        with torch.no_grad():
            return self.model(**batch).logits


if __name__ == "__main__":
    cli_evaluate()
