"""Adapters are added to a running engine and dropped; unknown ones are refused."""

import shutil
from functools import reduce
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from vllm.exceptions import VLLMValidationError

from peft_reft.serving import add_adapter, list_adapters, remove_adapter
from peft_reft.serving.engine.config import check_engine
from serving.engines import answer, ask, check, engine, make, params, prompt_of

PROMPT = prompt_of(14, 3)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A model of another family than the other tests have, so that their adapters do not fit it."""
    served = make("opt", str(tmp_path_factory.mktemp("opt")))
    served.add("first", positions="f2+l2")
    return served


@pytest.fixture(scope="module")
def llm(opt):
    with engine(opt, loreft={"max_adapters": 2, "max_rank": 4, "max_positions": 2}) as running:
        yield running


def works(served, llm, name):
    check(served, [(PROMPT, name)], ask(llm, [(PROMPT, name)], 5), 5)


def test_add_and_remove(opt, llm):
    opt.add("second", positions="f1+g", seed=5)
    opt.add("third", positions="l3", seed=6, r=2)
    add_adapter(llm, "second", opt.adapters["second"])
    assert list_adapters(llm) == ["first", "second"]
    works(opt, llm, "first")
    works(opt, llm, "second")
    remove_adapter(llm, "second")
    add_adapter(llm, "third", opt.adapters["third"])  # in the place of the second
    works(opt, llm, "third")
    remove_adapter(llm, "third")
    assert list_adapters(llm) == ["first"]


def test_another_adapter_of_the_same_name(opt, llm):
    """The second does not read what was cached with the first."""
    prompt = prompt_of(80, 4)
    for seed in (7, 8):
        opt.add("twice", positions="f4", seed=seed)
        add_adapter(llm, "twice", opt.adapters["twice"], replace=seed == 8)
        check(opt, [(prompt, "twice")], ask(llm, [(prompt, "twice")], 5), 5)
    remove_adapter(llm, "twice")


@pytest.mark.parametrize("then", ["replaced", "removed"])
def test_requests_finish_on_the_weights_that_they_began_with(opt, llm, then):
    """Also those that wait, and what they cache is not read under the new weights."""
    opt.add("old", positions="f4+g", seed=21)
    opt.add("new", positions="f4+g", seed=22)
    add_adapter(llm, "changes", opt.adapters["old"])
    prompts = [prompt_of(70, 40 + n) for n in range(3)]
    core = llm.llm_engine
    for n, prompt in enumerate(prompts):
        core.add_request(str(n), {"prompt_token_ids": prompt}, params("changes", 8))
    done = {}

    def run():
        done.update({int(output.request_id): output for output in core.step() if output.finished})

    run()
    if then == "replaced":
        add_adapter(llm, "changes", opt.adapters["new"], replace=True)
        for n, prompt in enumerate(prompts):
            core.add_request(str(3 + n), {"prompt_token_ids": prompt}, params("changes", 8))
    else:
        remove_adapter(llm, "changes")
        assert list_adapters(llm) == ["first"]
    while core.has_unfinished_requests():
        run()
    names = ["old"] * 3 + ["new"] * 3
    check(opt, list(zip(prompts * 2, names)), [done[n] for n in sorted(done)], 8)
    assert len(done) == (6 if then == "replaced" else 3)
    if then == "replaced":
        remove_adapter(llm, "changes")


@pytest.mark.parametrize("steps_before", [0, 1, 2, 5])
def test_aborted_requests(opt, llm, steps_before):
    """Requests are aborted while they wait, are read or decode. Others go on, and the place is free again."""
    opt.add("aborted", positions="f4+g", seed=23)
    add_adapter(llm, "aborted", opt.adapters["aborted"])
    core, prompts = llm.llm_engine, [prompt_of(60 + n, 50 + n) for n in range(4)]
    for n, prompt in enumerate(prompts):
        core.add_request(str(n), {"prompt_token_ids": prompt}, params("first" if n % 2 else "aborted", 8))
    outputs = []
    for _ in range(steps_before):
        outputs += core.step()
    remove_adapter(llm, "aborted")
    core.abort_request(["0", "2"])
    while core.has_unfinished_requests():
        outputs += core.step()
    done = {int(output.request_id): output for output in outputs if output.finished}
    check(opt, [(prompts[n], "first") for n in (1, 3)], [done[n] for n in (1, 3)], 8)
    for name in ("second of two", "a third"):  # two places are free: one for another adapter, one to replace it
        opt.add(name, positions="f2", seed=len(name))
        add_adapter(llm, "other", opt.adapters[name], replace=True)
    remove_adapter(llm, "other")


def test_a_folder_that_changes_while_it_is_served(opt, llm, tmp_path):
    """What was loaded is served on. A folder that changes while it is read is refused."""
    folder = tmp_path / "folder"
    shutil.copytree(opt.adapters["first"], folder)
    add_adapter(llm, "copied", str(folder))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:100])
    check(opt, [(PROMPT, "first")], ask(llm, [(PROMPT, "copied")], 5), 5)
    with pytest.raises(ValueError, match="damaged or cut short"):
        add_adapter(llm, "copied", str(folder), replace=True)
    check(opt, [(PROMPT, "first")], ask(llm, [(PROMPT, "copied")], 5), 5)
    remove_adapter(llm, "copied")


def test_bad_adapters_leave_the_engine_running(opt, llm, tmp_path):
    lora = tmp_path / "lora"
    get_peft_model(opt.load(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(lora)
    cut = tmp_path / "cut"
    shutil.copytree(opt.adapters["first"], cut)
    with (cut / "adapter_model.safetensors").open("rb+") as file:
        file.truncate(300)
    llama = make("llama", str(tmp_path))
    for source, message in (
        (tmp_path / "nowhere", "no folder"),
        (lora, "not of LoReFT"),
        (cut, "damaged or cut short"),
        (llama.add("of another model", positions="f1"), "Cannot find|does not fit"),
        (opt.add("large", r=8), "max_rank=8"),
        (opt.add("many", positions="f3", tie="position"), "max_positions=3"),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapter(llm, "bad", str(source))
        works(opt, llm, "first")
    with pytest.raises(ValueError, match="'first' already"):
        add_adapter(llm, "first", opt.adapters["first"])
    add_adapter(llm, "full", opt.adapters["first"])
    works(opt, llm, "first")
    with pytest.raises(ValueError, match="2 adapters already"):
        add_adapter(llm, "one more", opt.adapters["first"])
    remove_adapter(llm, "full")
    with pytest.raises(ValueError, match="no adapter 'full'"):
        remove_adapter(llm, "full")


@pytest.mark.parametrize("name", ["emoji", 3, ""])
def test_unknown_name(opt, llm, name):
    wrong = params(None, 2, extra_args={"loreft": name})
    with pytest.raises(
        VLLMValidationError, match=f"loreft={name!r}: there is no adapter of that name. There are: first"
    ):
        llm.generate([{"prompt_token_ids": PROMPT}], wrong, use_tqdm=False)
    works(opt, llm, "first")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loreft_scale": "much"}, "loreft_scale='much': expected a finite number"),
        ({"loreft_prompt_length": 15}, "loreft_prompt_length=15: the request has 14 tokens"),
        ({"loreft_strength": 2}, "loreft_strength=2: there is no such argument"),
        ({"loreft": "x" * 5000}, "loreft='xxx.*\\.\\.\\.: there is no adapter of that name"),
        ({"loreft": ["first"]}, "there is no adapter of that name"),
    ],
)
def test_wrong_arguments_fail_their_request_alone(opt, llm, more, message):
    llm.llm_engine.add_request("good", {"prompt_token_ids": PROMPT}, params("first", 4))
    wrong = params(None, 2, extra_args={"loreft": "first", **more})
    with pytest.raises(VLLMValidationError, match=message):
        llm.llm_engine.add_request("bad", {"prompt_token_ids": PROMPT}, wrong)
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    assert answer(outputs[-1].outputs[0])[0] == opt.expected(PROMPT, "first", 4)[0]


def test_an_engine_without_adapters_says_so(opt, llm):
    processor = llm.llm_engine.input_processor
    known = processor.__dict__.pop("loreft")
    try:
        with pytest.raises(VLLMValidationError, match="serves no LoReFT adapters"):
            ask(llm, [(PROMPT, "first")], 1)
        with pytest.raises(ValueError, match="serves no LoReFT adapters"):
            list_adapters(llm)
    finally:
        processor.loreft = known


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("parallel_config.prefill_context_parallel_size", 2, "prefill_context_parallel_size=2"),
        ("parallel_config.decode_context_parallel_size", 2, "decode_context_parallel_size=2"),
        ("parallel_config.use_sequence_parallel_moe", True, "enable_expert_parallel=True"),
        ("parallel_config.enable_dbo", True, "enable_dbo=True"),
        ("compilation_config.pass_config.enable_sp", True, "pass_config.enable_sp=True"),
        ("speculative_config.method", "eagle", "method='eagle'"),
        ("scheduler_config.async_scheduling", True, "async_scheduling=True"),
        ("model_config.runner_type", "pooling", "run as 'pooling'"),
        ("model_config.is_encoder_decoder", True, "an encoder-decoder"),
        ("cache_config.kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill=True"),
    ],
)
@pytest.mark.cell("Serving with vLLM", "`{field}={value!r}`", refused="docs/serving.md says why")
def test_engines_that_are_refused(field, value, message):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            use_sequence_parallel_moe=False,
            enable_dbo=False,
        ),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace()),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        model_config=SimpleNamespace(runner_type="generate", is_encoder_decoder=False, model="m"),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=SimpleNamespace(method="ngram"),
        use_v2_model_runner=False,
    )
    check_engine(config)
    *owners, name = field.split(".")
    setattr(reduce(getattr, owners, config), name, value)
    with pytest.raises(ValueError, match=message):
        check_engine(config)
