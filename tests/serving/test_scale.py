"""As many adapters as rows in a batch."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.engines import ask, check, engine, fields, make, prompt_of

MANY = 512


@pytest.mark.slow
def test_512_adapters_in_one_batch_of_512_rows(tmp_path):
    """Each row has weights of its own: adapters of two formulas, whose biases differ."""
    served = make("llama", str(tmp_path))
    for name in ("f+l+g", "noreft"):
        first = served.add(name, **fields(name))
        tensors = load_file(f"{first}/adapter_model.safetensors")
        for n in range(MANY // 2):
            own = f"{first}-{n}"
            shutil.copytree(first, own)
            changed = {key: value + 0.05 * n if key.endswith(".b") else value for key, value in tensors.items()}
            save_file(changed, f"{own}/adapter_model.safetensors", metadata={"format": "pt"})
            served.adapters[f"{name}-{n}"] = own
        del served.adapters[name]
    requests = [(prompt_of(6 + n % 5, n), name) for n, name in enumerate(served.adapters)]
    sizes = dict(max_num_seqs=MANY, max_num_batched_tokens=1024, max_model_len=64)
    with engine(served, **sizes) as llm:
        loreft = llm.llm_engine.model_executor.driver_worker.worker.loreft
        assert len(loreft.places) == MANY
        prepare, batches = loreft.prepare, []

        def note_and_prepare(pieces):
            batches.append((len(pieces.place), len({*pieces.place.tolist()})))
            return prepare(pieces)

        loreft.prepare = note_and_prepare
        outputs = ask(llm, requests, 12)
    assert (MANY, MANY) in batches
    chosen = torch.randperm(MANY, generator=torch.Generator().manual_seed(0))[:24].tolist()
    check(served, [requests[n] for n in chosen], [outputs[n] for n in chosen], 12)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > MANY // 2
