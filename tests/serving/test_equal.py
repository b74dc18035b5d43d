"""vLLM and transformers give the same tokens and log-probabilities with an adapter, in fp32."""

import pytest
import torch

from serving.engines import ADAPTERS, answer, ask, check, engine, params, prompt_of, steps

LENGTHS = (1, 2, 3, 5, 9, 40)


@pytest.fixture(scope="module")
def everything(llama):
    with engine(llama) as llm:
        yield llm


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_adapter(llama, everything, name):
    requests = [(prompt_of(length, length), name) for length in LENGTHS]
    check(llama, requests, ask(everything, requests, 6), 6)


def test_adapters_edit(llama):
    """The test above is not empty: every adapter changes the answer of the base."""
    prompt = prompt_of(40, 40)
    base = llama.expected(prompt, None, 6)[1]
    for name in ADAPTERS:
        assert llama.expected(prompt, name, 6)[1] != pytest.approx(base, abs=1e-3), name


def test_all_in_one_batch(llama, everything):
    requests = [(prompt_of(length, n), name) for n, name in enumerate([None, *ADAPTERS]) for length in (4, 17)]
    check(llama, requests, ask(everything, requests, 6), 6)


def test_without_an_adapter_it_is_the_base_exactly(llama, everything):
    requests = [(prompt_of(length, length), None) for length in LENGTHS]
    mixed = [request for each in requests for request in (each, (each[0], "all"))]
    ours = [answer(output.outputs[0]) for output in ask(everything, requests, 8)]
    beside = [answer(output.outputs[0]) for output in ask(everything, mixed, 8)[::2]]
    assert [tokens for tokens, _ in beside] == [tokens for tokens, _ in ours]
    modules = everything.llm_engine.model_executor.driver_worker.worker.loreft.model.modules()
    hooks = [module._forward_hooks for module in modules if module._forward_hooks]
    saved = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    assert ours == [answer(output.outputs[0]) for output in ask(everything, requests, 8)]
    for each, own in zip(hooks, saved):
        each.update(own)


@pytest.mark.filterwarnings("ignore")
def test_continuous_arrival(llama, everything):
    names = ["f7+l7", None, "f+l+g", "per layer", "all", "by position", "relu", "g"]
    requests = [(prompt_of(5 + 3 * n, n), name) for n, name in enumerate(names)]
    check(llama, requests, steps(everything, requests, 12), 12)


def test_a_callers_own_salt_is_kept(llama, everything):
    prompt = prompt_of(70, 9)
    processor = everything.llm_engine.input_processor
    salts = []
    for adapter, salt in ((None, "mine"), ("all", None), ("all", "mine"), ("g", "mine")):
        given = {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
        engine_input = everything.llm_engine.renderer.render_cmpl([given])[0]
        request = processor.process_inputs("0", engine_input, params(adapter, 1), ("generate",))
        salts.append(request.cache_salt)
    assert salts[0] == "mine" and salts[2].endswith(":mine") and len({*salts}) == 4


def test_several_answers_to_a_request(llama, everything):
    prompt = prompt_of(12, 3)
    outputs = everything.generate(
        [{"prompt_token_ids": prompt}], params("f+l+g", 6, n=3, temperature=1, top_k=1), use_tqdm=False
    )
    wanted = llama.expected(prompt, "f+l+g", 6)
    assert [answer(completion)[0] for completion in outputs[0].outputs] == [wanted[0]] * 3


@pytest.mark.parametrize("name", [None, "f7+l7", "p", "by position"])
def test_log_probabilities_of_the_prompt(llama, everything, name):
    prompt = prompt_of(21, 5)
    output = everything.generate([{"prompt_token_ids": prompt}], params(name, 1, prompt_logprobs=0), use_tqdm=False)[0]
    found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:])]
    llama.expected(prompt, name, 1)
    with torch.no_grad():
        logits = llama.models[name or ""](input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    wanted = logits[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert found == pytest.approx(wanted, abs=2e-4)
