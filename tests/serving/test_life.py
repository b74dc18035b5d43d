"""Adapters are added to a running engine and dropped; unknown ones are refused."""

import os
import shutil
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from vllm.exceptions import VLLMValidationError

from peft_reft.serving import AdapterFiles, add_adapter, list_adapters, remove_adapter
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


@pytest.mark.parametrize("then", ["replaced", "replaced by files", "removed"])
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
    replaced = then != "removed"
    if replaced:
        new = opt.adapters["new"]
        add_adapter(llm, "changes", AdapterFiles.read(new) if "files" in then else new, replace=True)
        for n, prompt in enumerate(prompts):
            core.add_request(str(3 + n), {"prompt_token_ids": prompt}, params("changes", 8))
    else:
        remove_adapter(llm, "changes")
        assert list_adapters(llm) == ["first"]
    while core.has_unfinished_requests():
        run()
    names = ["old"] * 3 + ["new"] * 3
    check(opt, list(zip(prompts * 2, names)), [done[n] for n in sorted(done)], 8)
    assert len(done) == (6 if replaced else 3)
    if replaced:
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


def policies(served, number):
    """An adapter as training changes it step by step, each time as the files that are sent, and what it is called.

    All have one config, as those of a run have; transformers reads them from a folder.
    """
    files = AdapterFiles.read(served.add("policy 0", positions="f4+g", seed=30))
    for n in range(number):
        generator = torch.Generator().manual_seed(n)
        moved = {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in load(files.weights).items()}
        files = AdapterFiles(files.config, save(moved, {"format": "pt"}))
        folder = Path(served.folder).parent / f"policy {n}"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_bytes(files.config)
        (folder / "adapter_model.safetensors").write_bytes(files.weights)
        served.adapters[f"policy {n}"] = str(folder)
        yield f"policy {n}", files


def held(llm):
    """How much the engine holds of adapters: places, models that adapters are read into, and what the core knows."""

    def in_worker(worker):
        server = worker.loreft
        return len(server.places), len(server.reader.made), len(server.plans), len(server.formulas)

    adapters = llm.llm_engine.engine_core.engine_core.loreft
    return llm.collective_rpc(in_worker)[0], len(adapters.named), len(adapters.paths), len(adapters.coming)


@pytest.mark.slow
@pytest.mark.cell("Serving with vLLM", "adapters that are sent as bytes, and replaced at each step of a training")
def test_files_that_are_sent_again_and_again(opt, llm):
    """As training sends its policy. Each rollout comes from the newest one, reads no block of an older one, and
    nothing piles up; the same files once more change nothing, and their blocks stay.
    """
    prompt, other = prompt_of(80, 60), prompt_of(81, 61)
    before = None
    for n, (name, files) in enumerate(policies(opt, 50)):
        add_adapter(llm, "policy", files, replace=True)
        (output,) = ask(llm, [(prompt, "policy")], 4)
        assert output.num_cached_tokens == 0
        check(opt, [(prompt, name)], [output], 4)
        if n == 1:
            before = held(llm)
    assert before is not None and held(llm) == before
    add_adapter(llm, "policy", AdapterFiles(files.config, files.weights), replace=True)
    (again,) = ask(llm, [(prompt, "policy")], 4)
    assert again.num_cached_tokens == 64
    add_adapter(llm, "policy", opt.adapters[name], replace=True)  # the equal folder has the same fingerprint
    (again,) = ask(llm, [(prompt, "policy")], 4)
    assert again.num_cached_tokens == 64
    check(opt, [(prompt, name)], [again], 4)
    assert [each.num_cached_tokens for each in ask(llm, [(other, None), (other, None)], 1)][-1] == 64
    add_adapter(llm, "policy", AdapterFiles.read(opt.adapters["first"]), replace=True)
    assert ask(llm, [(other, None)], 1)[0].num_cached_tokens == 64  # the base's blocks stay
    remove_adapter(llm, "policy")
    assert list_adapters(llm) == ["first"]


def test_files_that_cannot_be_served_change_nothing(opt, llm, tmp_path):
    good = AdapterFiles.read(opt.add("sent", positions="f2+g", seed=31))
    add_adapter(llm, "sent", good)
    state, tensors = held(llm), load(good.weights)
    infinite = save({name: tensor * torch.inf for name, tensor in tensors.items()})
    torch.save(tensors, tmp_path / "pickle")
    for config, weights, message in (
        (good.config, good.weights[:-9], "^adapter_model.safetensors is damaged or cut short"),
        (good.config, (tmp_path / "pickle").read_bytes(), "adapter_model.safetensors is damaged or cut short"),
        (good.config, b"", "adapter_model.safetensors is damaged or cut short"),
        (good.config, infinite, "^adapter_model.safetensors .*infinite or not a number"),
        (good.config.replace(b'"r": 4', b'"r": 3'), good.weights, "The adapter that was sent does not fit"),
        (b"[]", good.weights, "adapter_config.json cannot be used: expected an object, found list"),
        (b"\xff", good.weights, "adapter_config.json cannot be used"),
        (good.config.replace(b"LOREFT", b"LORA"), good.weights, "type LORA, not of LoReFT"),
        (good.config.replace(b'"r": 4', b'"r": 0'), good.weights, "adapter_config.json cannot be used: r=0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            add_adapter(llm, "sent", AdapterFiles(config, weights), replace=True)
        assert os.sep not in str(error.value).replace("https://", "")  # no folder that the sender does not know
        check(opt, [(PROMPT, "sent")], ask(llm, [(PROMPT, "sent")], 5), 5)
    with pytest.raises(ValueError, match="weights is of type str: expected what is in the file, as bytes"):
        AdapterFiles(good.config, "adapter")
    assert held(llm)[1:] == state[1:] and held(llm)[0][0] == state[0][0]
    remove_adapter(llm, "sent")


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
