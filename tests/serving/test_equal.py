"""vLLM and transformers give the same tokens and log-probabilities with an adapter, in fp32."""

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from peft_reft.serving.engine.config import version
from peft_reft.tuner.layer import LoReftLayer
from serving.engines import ADAPTERS, answer, ask, check, engine, params, prompt_of, steps

LENGTHS = (1, 2, 3, 5, 9, 40)


@pytest.fixture(scope="module")
def everything(llama):
    with engine(llama) as llm:
        yield llm


@pytest.mark.parametrize("name", [None, *ADAPTERS])
@pytest.mark.cell("Serving with vLLM", f"vLLM {version()}: formulas, positions, ways of tying")
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
    """Requests of another salt find no block, whatever the adapter."""
    prompt = prompt_of(140, 9)
    for adapter in (None, "l"):
        for salt, finds in (("mine", False), ("yours", False), ("mine", True)):
            if adapter is not None and salt == "mine":
                finds = True  # of the base's
            given = {"prompt_token_ids": prompt, "cache_salt": f"{salt} {adapter if salt == 'yours' else ''}"}
            output = everything.generate([given], params(adapter, 4), use_tqdm=False)[0]
            check(llama, [(prompt, adapter)], [output], 4)
            assert (output.num_cached_tokens > 0) is finds


def test_blocks_without_edits_are_the_bases(llama, everything):
    """The base, then adapters that edit the prompt's end, on one document: each finds all blocks before its edits."""
    prompt = prompt_of(200, 11)
    names = [None, "l", "l~", "some layers", "by name", "by position, answers", "g", None, "l"]
    cached = []
    for name in names:
        output = ask(everything, [(prompt, name)], 6)[0]
        check(llama, [(prompt, name)], [output], 6)
        cached.append(output.num_cached_tokens)
    assert cached[0] == 0 and min(cached[1:]) >= 128


def test_a_request_cannot_say_what_the_core_says(everything):
    forged = params("l", 1)
    forged.extra_args = {**forged.extra_args, "loreft_choice": {"facts": {"fingerprint": "another"}}}
    with pytest.raises(VLLMValidationError, match="there is no such argument"):
        everything.generate([{"prompt_token_ids": prompt_of(5, 1)}], forged, use_tqdm=False)


@pytest.mark.parametrize("name", ["f+l+g", "red", "by position"])
def test_each_request_scales_its_edits(llama, everything, name):
    """Different scales in one batch, on one prompt: also no request reads a block of another scale."""
    prompt, scales = prompt_of(70, 50), [1.0, 0.5, -0.25, 0, 2]
    asked = [params(name, 5, extra_args={"loreft": name, "loreft_scale": scale}) for scale in scales]
    llama.expected(prompt, name, 5)
    model = llama.models[name]
    for _ in range(2):
        outputs = everything.generate([{"prompt_token_ids": prompt}] * len(scales), asked, use_tqdm=False)
        for scale, output in zip(scales, outputs):
            for module in model.modules():
                if isinstance(module, LoReftLayer):
                    module.set_scale("default", scale)
            wanted = llama._generate(prompt, name, 5)
            assert answer(output.outputs[0])[0] == wanted[0]
            assert answer(output.outputs[0])[1] == pytest.approx(wanted[1], abs=2e-4)
    for module in model.modules():
        if isinstance(module, LoReftLayer):
            module.set_scale("default", 1.0)


@pytest.mark.parametrize(("seed", "name"), [*enumerate(["f7+l7", "l", "p", "g", "all", "f+l+g"])])
def test_two_questions_to_one_document(llama, everything, seed, name):
    """Their prompts differ in length and end. Blocks are shared up to the block in which edits begin to differ."""
    document = prompt_of(150, 300 + seed)  # adapters share blocks without edits
    cached = []
    for number, length in enumerate((9, 30, 17)):
        prompt = document + prompt_of(length, 20 + number)
        output = ask(everything, [(prompt, name)], 5)[0]
        check(llama, [(prompt, name)], [output], 5)
        cached.append(output.num_cached_tokens)
    assert cached[0] == 0 and min(cached[1:]) >= 128


def test_several_answers_to_a_request(llama, everything):
    prompt = prompt_of(12, 3)
    outputs = everything.generate(
        [{"prompt_token_ids": prompt}], params("f+l+g", 6, n=3, temperature=0.01), use_tqdm=False
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


@pytest.mark.parametrize("name", ["f7+l7", "l", "f+l+g", "by position", "all"])
def test_log_probabilities_of_an_answer_that_is_given(llama, everything, name):
    """Scoring: the request says where its prompt ends. The same as transformers with labels."""
    ids, prompt_length = prompt_of(40, 6), 23
    asked = params(name, 1, extra_args={"loreft": name, "loreft_prompt_length": prompt_length}, prompt_logprobs=0)
    output = everything.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)[0]
    found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:])]
    llama.expected(ids, name, 1)
    labels = torch.tensor([ids])
    labels[:, :prompt_length] = -100
    with torch.no_grad():
        logits = llama.models[name](input_ids=torch.tensor([ids]), labels=labels).logits[0].log_softmax(-1)
    wanted = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found == pytest.approx(wanted, abs=2e-4)
