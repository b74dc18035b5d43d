"""The ways to choose an adapter in Python that vLLM has for LoRA; adapters that are loaded on their first use."""

import os

import pytest
from peft import LoraConfig, get_peft_model
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from peft_reft.serving import list_adapters, remove_adapter
from serving.engines import check, engine, make, params, prompt_of

PROMPT = prompt_of(14, 3)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    served = make("opt", str(tmp_path_factory.mktemp("opt")))
    served.add("first", positions="f2+l2")
    served.add("second", positions="l3", seed=5)
    return served


@pytest.fixture(scope="module")
def llm(opt):
    source = os.path.dirname(opt.folder)
    with engine(opt, ["first"], loreft={"max_adapters": 2, "max_rank": 4, "resolve_from": source}) as running:
        yield running


@pytest.fixture(autouse=True)
def only_first(llm):
    yield
    for name in list_adapters(llm):
        if name != "first":
            remove_adapter(llm, name)


def works(opt, llm, adapter, lora_request=None, name=None):
    """A request by name or by `LoRARequest` gets the adapter's answer, and one beside it the base's."""
    chosen = [params(name, 5), params(None, 5)]
    prompts = [{"prompt_token_ids": PROMPT}] * 2
    outputs = llm.generate(prompts, chosen, lora_request=[lora_request, None], use_tqdm=False)
    check(opt, [(PROMPT, adapter), (PROMPT, None)], outputs, 5)


def test_a_lora_request(opt, llm):
    path = opt.adapters["second"]
    for _ in range(2):
        works(opt, llm, "second", LoRARequest("asked", 7, path))
    assert list_adapters(llm) == ["asked", "first"]
    works(opt, llm, "second", name="asked")
    works(opt, llm, "first", LoRARequest("first", 1, opt.adapters["first"]))
    with pytest.raises(VLLMValidationError, match=r"'asked' already, from .*opt-second"):
        works(opt, llm, "first", LoRARequest("asked", 7, opt.adapters["first"]))
    works(opt, llm, "first", LoRARequest("asked", 7, opt.adapters["first"], load_inplace=True))
    works(opt, llm, "first", name="asked")


def test_a_lora_request_and_a_name(opt, llm):
    asked = LoRARequest("asked", 7, opt.adapters["second"])
    works(opt, llm, "second", asked, name="asked")
    with pytest.raises(VLLMValidationError, match="loreft='first': the request names 'asked' as its model"):
        works(opt, llm, "first", asked, name="first")


def test_add_lora(opt, llm):
    for _ in range(2):
        assert llm.llm_engine.add_lora(LoRARequest("added", 3, opt.adapters["second"]))
    assert list_adapters(llm) == ["added", "first"]
    works(opt, llm, "second", name="added")


def test_lora_adapters_go_to_vllm(opt, llm, tmp_path):
    get_peft_model(opt.load(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(VLLMValidationError, match="LoRA is not enabled"):
        works(opt, llm, None, LoRARequest("lora", 1, str(tmp_path)))


def test_an_engine_without_adapters_says_how_to_start(opt, llm):
    processor = llm.llm_engine.input_processor
    kept = processor.__dict__.pop("loreft")
    try:
        with pytest.raises(VLLMValidationError, match="is a LoReFT adapter, and this engine serves none"):
            works(opt, llm, "first", LoRARequest("first", 1, opt.adapters["first"]))
    finally:
        processor.loreft = kept


def test_beams_are_refused(opt, llm):
    with pytest.raises(VLLMValidationError, match="loreft='first': beam search cannot"):
        llm.beam_search([{"prompt_token_ids": PROMPT}], None, LoRARequest("first", 1, opt.adapters["first"]))


def test_first_use(opt, llm):
    """Names of folders in `resolve_from`. "opt-first" has the weights of "first", and another name."""
    works(opt, llm, "second", name="opt-second")
    assert list_adapters(llm) == ["first", "opt-second"]
    works(opt, llm, "first", name="opt-first")  # drops opt-second, which no request uses
    assert list_adapters(llm) == ["first", "opt-first"]
    llm.llm_engine.add_request("0", {"prompt_token_ids": PROMPT}, params("opt-first", 8))
    with pytest.raises(VLLMValidationError, match="There are 2 adapters already"):
        works(opt, llm, "second", name="opt-second")
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    works(opt, llm, "second", name="opt-second")


@pytest.mark.parametrize(
    "name", ["..", ".", "../opt/opt-first", "opt-first/.", "/etc", "opt-first\0", "", "opt-none", "opt", ["opt-first"]]
)
def test_names_stay_in_the_folder(opt, llm, name):
    with pytest.raises(VLLMValidationError, match="there is no adapter of that name"):
        llm.generate([{"prompt_token_ids": PROMPT}], params(None, 2, extra_args={"loreft": name}), use_tqdm=False)
    assert list_adapters(llm) == ["first"]


def test_a_bad_adapter_in_the_folder_fails_its_request_alone(opt, llm):
    opt.add("large", r=8)
    with pytest.raises(VLLMValidationError, match="'opt-large' needs max_rank=8"):
        works(opt, llm, "large", name="opt-large")
    works(opt, llm, "first", name="first")
