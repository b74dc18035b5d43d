"""Reinforcement learning in TRL: rollouts of several turns, truncated answers, reward adapters, references.

In every test the log-probs of each rollout are compared with those that the trainer's forward gives to the same tokens
(`Recorded`), so a test fails if one of the two edits other tokens than the other.
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import contextlib
import importlib

import pytest
import torch
import trl.trainer.grpo_trainer
from conftest import build, randomise
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, ContinuousBatchingConfig, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head, use_adapter

from peft_reft import LoReftConfig, chat_marks

from .conftest import PAIRS
from .rollouts import CALLS, Recorded, edits_disabled, lookup, qwen_base, qwen_like, word_of
from .training import WARNINGS, arguments, assert_all_moved, logs, trainable

pytestmark = WARNINGS

SECTION = "Trainers: preferences and reinforcement"
GRPO, RLOO = (GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)
BOTH = pytest.mark.parametrize("which", [GRPO, pytest.param(RLOO, marks=pytest.mark.slow)], ids=["GRPO", "RLOO"])
BATCHING = dict(
    use_transformers_continuous_batching=True,
    # Small, so that prompts are cut, and a CPU is fast.
    transformers_continuous_batching_config=dict(
        page_size=16, num_blocks=1024, max_batch_tokens=256, return_logprobs=True
    ),
)
ENGINES = pytest.mark.parametrize(
    "engine", [{}, pytest.param(BATCHING, marks=pytest.mark.slow)], ids=["generate", "continuous_batching"]
)
TEXT = [{"prompt": prompt} for prompt, _ in PAIRS]
CHATS = [{"prompt": [{"role": "user", "content": prompt}]} for prompt, _ in PAIRS]

NO_HEADERS = dict(response_template=[], instruction_template=[])
"""As a run leaves them in which no document had a header."""


def alternating(completions, **kwargs):
    return [float(n % 2) for n in range(len(completions))]


def loreft(positions="f2+l2", **fields):
    return LoReftConfig(task_type="CAUSAL_LM", **{"r": 4, "positions": positions, **fields})


@pytest.fixture
def make(tokenizer, tmp_path):
    """Make a trainer on a tiny model whose adapter edits enough to see."""

    def make(which=GRPO, data=TEXT, base=None, peft_config="default", given=None, tokenizer=tokenizer, **settings):
        base = build("llama") if base is None else base
        base.generation_config.eos_token_id = [2, *range(48, 64)]  # rows end at different lengths
        settings = {**dict(num_generations=2, max_completion_length=5, learning_rate=0.01), **settings}
        trainer = which[0](
            base,
            args=arguments(which[1], tmp_path, **settings),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=loreft() if peft_config == "default" else peft_config,
            **{"reward_funcs": alternating, **(given or {})},
        )
        if peft_config is not None:
            randomise(trainer.model)
        return trainer

    return make


# Rollouts of several turns


class Drawer:
    """An environment whose one tool is `lookup`. Its reward is how often it was asked, and a little chance."""

    def reset(self, **kwargs):
        self.asked = 0
        return " please"

    def lookup(self, key: str) -> str:
        """
        Looks a word up.

        Args:
            key: The word.

        Returns:
            What is known of it.
        """
        self.asked += 1
        return lookup(key)

    def get_reward(self):
        return self.asked + torch.rand(()).item()


def calls_whatever(tokenizer, ids, prefix=None, tools=None):
    """Take whatever a tiny model wrote for the next call of its conversation (`parse_response`)."""
    message = {"role": "assistant", "content": "w"}
    text = tokenizer.decode(prefix)
    calls, done = CALLS[word_of(text)], text.count("user\n<tool_response>\n")
    if done < len(calls):
        function = {"name": "lookup", "arguments": {"key": calls[done]}}
        message["tool_calls"] = [{"type": "function", "function": function}]
    return message


def with_tools(make, monkeypatch, given, **settings):
    monkeypatch.setattr(trl.trainer.grpo_trainer, "parse_response", calls_whatever)
    tokenizer = qwen_like()
    base = qwen_base(tokenizer)
    base.config.max_position_embeddings = 4096
    data = [{"prompt": [{"role": "user", "content": word}]} for word in CALLS]
    sizes = dict(per_device_train_batch_size=6, max_completion_length=280, generation_kwargs=dict(max_new_tokens=12))
    trainer = make(data=data, base=base, tokenizer=tokenizer, given=given, **{**sizes, **settings})
    trainer.eos_token_ids[:] = [*trainer.eos_token_ids, *range(100, 150)]  # ragged answers
    return trainer, Recorded(monkeypatch, trainer, tolerance=1e-4 if settings.get("bf16") else 2e-5)


def assert_edits_at_every_end(trainer, recorded, first=2, last=2):
    """Score each row again with the positions that its rollouts alone tell; other positions score otherwise."""
    model = trainer.model.eval()
    turns = []
    for document, scored in recorded.documents:
        ends = recorded.ends(document)
        positions = [*range(first), *(end - n for end in ends for n in range(last, 0, -1))]
        for told, same in ((positions, True), (positions[: first + last], len(ends) == 1)):
            with torch.no_grad():
                ids = torch.tensor([document])
                logits = model(input_ids=ids, intervention_positions=torch.tensor([told])).logits[0]
            found = logits[-len(scored) - 1 : -1].log_softmax(-1)
            found = found.gather(-1, ids[0, -len(scored) :, None]).squeeze(-1)
            assert ((found - scored).abs().max() < 2e-5) == same
        turns.append(len(ends))
    return turns


@ENGINES
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(
            dict(tools=[lookup]),
            id="tools",
            marks=[pytest.mark.cell(SECTION, "GRPO with tools: several turns"), pytest.mark.slow],
        ),
        pytest.param(
            dict(environment_factory=Drawer, reward_funcs=None),
            id="environment",
            marks=pytest.mark.cell(SECTION, "GRPO with environments: several turns"),
        ),
    ],
)
def test_turns(make, monkeypatch, given, engine):
    trainer, recorded = with_tools(make, monkeypatch, given, max_steps=1, learning_rate=0.0, **engine)
    trainer.train()
    assert sorted(set(assert_edits_at_every_end(trainer, recorded))) == [1, 2, 3]
    assert recorded.compared == 2 * (1 + 2 + 3)


def two_turns(tokenizer, chat, batching):
    """Make a user's own loop (`rollout_func`): the model writes, is told something, and writes again."""
    first, second = "{}", " u v"
    if chat:
        first, second = "<|im_start|>user {} <|im_end|> <|im_start|>assistant ", " <|im_end|> <|im_start|>user u v"
    if chat == "whole":
        second += " <|im_end|> <|im_start|>assistant "

    def written(trainer, row):
        with unwrap_model_for_generation(trainer.model, trainer.accelerator) as model, torch.no_grad():
            if batching:
                sizes = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64)
                outputs = model.generate_batch([row], trainer.generation_config, continuous_batching_config=sizes)
                model.train()  # as TRL does: transformers leaves it in evaluation
                return next(iter(outputs.values())).generated_tokens
            ids = torch.tensor([row])
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=trainer.generation_config
            )
            return out[0, len(row) :].tolist()

    def rollout(prompts, trainer):
        found = dict(prompt_ids=[], completion_ids=[], env_mask=[], logprobs=None)
        for prompt in prompts:
            ids, told = tokenizer(first.format(prompt))["input_ids"], tokenizer(second)["input_ids"]
            answer = written(trainer, ids)
            more = written(trainer, [*ids, *answer, *told])
            found["prompt_ids"].append(ids)
            found["completion_ids"].append([*answer, *told, *more])
            found["env_mask"].append([1] * len(answer) + [0] * len(told) + [1] * len(more))
        return found

    return rollout


def with_two_turns(make, tokenizer, positions, chat, batching=False, **fields):
    given = dict(rollout_func=two_turns(tokenizer, chat, batching))
    trainer = make(given=given, max_completion_length=20, peft_config=loreft(positions, **fields))
    trainer.generation_config.max_new_tokens = 4
    return trainer


@pytest.mark.parametrize(
    ("positions", "chat"),
    [
        ("f2+l2", "whole"),
        pytest.param("p+g2", "whole", marks=pytest.mark.slow),
        pytest.param("all", None, marks=pytest.mark.slow),
        pytest.param("f2", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.cell(SECTION, "GRPO with `rollout_func`: several turns")
def test_a_rollout_function_of_several_turns(make, tokenizer, monkeypatch, positions, chat):
    """Specs that need no prompt's end need no headers."""
    trainer = with_two_turns(make, tokenizer, positions, chat)
    recorded = Recorded(monkeypatch, trainer)
    trainer.train()
    assert recorded.compared >= 2 * 2 * 8


@pytest.mark.parametrize(
    ("positions", "chat", "batching", "message"),
    [
        ("f2+l2", None, False, "no header of the chat template is known there"),
        ("l1", "without the second header", False, "no header of the assistant stands there"),
        pytest.param("p", None, True, "no header of the chat template is known there", marks=pytest.mark.slow),
        pytest.param(
            "g2", "without the second header", True, "no header of the assistant stands there", marks=pytest.mark.slow
        ),
    ],
)
def test_turns_that_training_cannot_see_are_refused(make, tokenizer, positions, chat, batching, message):
    """Nothing says where the second prompt of a row ends."""
    trainer = with_two_turns(make, tokenizer, positions, chat, batching, **({} if chat else NO_HEADERS))
    with pytest.raises(ValueError, match=f"cannot see that a prompt ended there: {message}.*response_template"):
        trainer.train()


# The other settings


@BOTH
@ENGINES
@pytest.mark.cell(SECTION, "GRPO, RLOO: `mask_truncated_completions`, also if all answers of a batch are truncated")
def test_truncated_answers(make, monkeypatch, which, engine):
    settings = dict(beta=0.1, max_steps=3, **engine)
    trainer = make(which, mask_truncated_completions=True, max_completion_length=2, **settings)
    recorded = Recorded(monkeypatch, trainer)
    assert_all_moved(trainer.model, trainer.train)
    lengths = [len(scored) for _, scored in recorded.documents]
    assert 0 in lengths and max(lengths) > 0 and recorded.compared
    never = dict(generation_kwargs=dict(suppress_tokens=[0, 2, *range(48, 64)]))  # nothing ends an answer
    trainer = make(which, mask_truncated_completions=True, max_completion_length=2, **never, **settings)
    trainer.train()
    assert all(loss == pytest.approx(0) for loss in logs(trainer, "loss"))


@ENGINES
@pytest.mark.cell(SECTION, "GRPO: `num_iterations`, `steps_per_generation`, shared prompts")
def test_several_updates_of_one_rollout(make, monkeypatch, engine):
    trainer = make(
        num_iterations=2,
        steps_per_generation=2,
        num_generations=4,
        per_device_train_batch_size=4,
        max_steps=8,
        **engine,
    )
    recorded = Recorded(monkeypatch, trainer)
    score, first = trainer._get_per_token_logps_and_entropies, []

    def of_the_old_policy(model, *args, **kwargs):
        """Compare only what is scored before an update: the old log-probs, computed without gradients."""
        if torch.is_grad_enabled():
            return recorded._score(model, *args, **kwargs)
        first.append(len(args[0]))
        return score(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", of_the_old_policy)
    assert_all_moved(trainer.model, trainer.train)
    assert first == [8, 8] and recorded.compared == 16
    assert len({tuple(prompt) for prompt, *_ in recorded.calls}) == 2  # four answers to each of two prompts


def test_evaluation(make, monkeypatch):
    trainer = make(given=dict(eval_dataset=Dataset.from_list(TEXT[:4])))
    recorded = Recorded(monkeypatch, trainer)
    trainer.evaluate()
    assert recorded.compared == 8


# Adapters that judge


@pytest.fixture
def reward_folder(tmp_path, tokenizer):
    """A folder with a base model, and one with a reward adapter for it, trained by TRL. Its head is saved with it."""
    build("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"chosen": f"{prompt} {answer}", "rejected": f"{answer} {prompt}"} for prompt, answer in PAIRS]
    trainer = RewardTrainer(
        LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1),
        args=arguments(RewardConfig, tmp_path, max_steps=3, learning_rate=0.05),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoReftConfig(task_type="SEQ_CLS", r=4, positions="f2+l2"),
    )
    randomise(trainer.model)
    trainer.train()
    trainer.save_model(tmp_path / "reward")
    return tmp_path / "reward"


def judged(model, tokenizer, texts):
    """Score texts one by one, without padding."""
    found = []
    for text in texts:
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            found.append(model(input_ids=ids).logits.item())
    return found


@pytest.mark.parametrize("how", ["shared weights", pytest.param("folder", marks=pytest.mark.slow)])
@pytest.mark.cell(SECTION, "GRPO: the reward model is a LoReFT adapter, with weights of the policy's base")
def test_a_reward_adapter_scores(make, tokenizer, reward_folder, how):
    policy = build("llama")
    reward = str(reward_folder)
    if how == "shared weights":
        base = AutoModelForSequenceClassification.from_pretrained(reward_folder.parent / "base", num_labels=1)
        base.load_state_dict(policy.state_dict(keep_vars=True), strict=False, assign=True)
        reward = PeftModel.from_pretrained(base, reward_folder).get_base_model()
        assert base.get_parameter("model.norm.weight") is policy.get_parameter("model.norm.weight")
    given = dict(reward_funcs=reward, reward_processing_classes=tokenizer)
    trainer = make(base=policy, given=given, max_steps=2)
    assert_all_moved(trainer.model, trainer.train)
    alone = PeftModel.from_pretrained(
        LlamaForSequenceClassification.from_pretrained(reward_folder.parent / "base", num_labels=1), reward_folder
    )
    texts = [prompt + answer for prompt, answer in zip(trainer._logs["prompt"], trainer._logs["completion"])]
    (scores,) = trainer._logs["rewards"].values()
    assert list(scores) == pytest.approx(judged(alone, tokenizer, texts), abs=1e-5)
    with alone.disable_adapter():
        assert max(abs(a - b) for a, b in zip(scores, judged(alone, tokenizer, texts))) > 1e-2


def likes_y(model, tokenizer, texts):
    """Score texts by what a causal language model thinks of "y" behind each."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    return model(**batch).logits[:, -1].log_softmax(-1)[:, tokenizer.convert_tokens_to_ids("y")].tolist()


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("head", [None, ["lm_head"]], ids=["no_head", "own_head"])
@pytest.mark.cell(SECTION, "GRPO: a second adapter of the policy's model scores (`set_adapter`)")
def test_a_second_adapter_judges(make, tokenizer, tmp_path, head, engine):
    """Training is, bit by bit, what it is if another model gives these rewards."""
    judge = get_peft_model(build("llama"), loreft("l3", modules_to_save=head)).eval()
    randomise(judge, seed=7)
    for name, parameter in judge.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    judge.save_pretrained(tmp_path / "judge")
    results = []
    for beside in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), loreft())
        randomise(model)
        model.load_adapter(tmp_path / "judge", "judge")
        trained, scores = sorted(trainable(model)), []

        def reward(prompts, completions, model=model, beside=beside, trained=trained, scores=scores, **kwargs):
            texts = [f"{prompt} {completion}" for prompt, completion in zip(prompts, completions)]
            switched = use_adapter(model, "judge") if beside else contextlib.nullcontext()
            with switched, torch.inference_mode():
                scores.append(likes_y(model if beside else judge, tokenizer, texts))
            assert model.active_adapter == "default" and sorted(trainable(model)) == trained
            return scores[-1]

        trainer = make(base=model, peft_config=None, given=dict(reward_funcs=reward), max_steps=3, beta=0.1, **engine)
        trainer.train()
        results.append((scores, logs(trainer, "loss"), trainable(model)))
    (scores, losses, weights), (scores_beside, losses_beside, weights_beside) = results
    assert scores == scores_beside and losses == losses_beside
    assert all(torch.equal(weights[name], weights_beside[name]) for name in weights)
    assert len({score for step in scores for score in step}) > 8


# References


@BOTH
@ENGINES
@pytest.mark.cell(SECTION, "GRPO, RLOO: reference log-probs are the base model's, to the bit")
def test_the_reference_is_the_base(make, monkeypatch, which, engine):
    trainer = make(which, beta=0.1, max_steps=3, **engine)
    base = build("llama")
    add_fused_lm_head(base)
    recorded, score = Recorded(monkeypatch, trainer), trainer._get_per_token_logps_and_entropies
    compared = []

    def spied(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if edits_disabled(model):
            labels = input_ids.masked_fill(attention_mask == 0, -100)
            labels[:, :-logits_to_keep] = -100
            out = base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
            compared.append(torch.equal(result[0], out.log_probs[:, -logits_to_keep:]))
        return result

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", spied)
    assert_all_moved(trainer.model, trainer.train)
    assert compared == [True] * 3 and recorded.compared
    for (document, reference), (same, scored) in zip(recorded.reference, recorded.documents):
        assert document != same or (reference - scored).abs().max() > 1e-3


@BOTH
@pytest.mark.cell(SECTION, "GRPO, RLOO: `sync_ref_model`", refused="TRL has it for full fine-tuning alone")
def test_a_synced_reference_is_refused(make, which):
    with pytest.raises(NotImplementedError, match=r"sync_ref_model=True.*PEFT"):
        make(which, beta=0.1, sync_ref_model=True)


@BOTH
def test_a_reference_adapter_stays_as_it_was(make, tmp_path, monkeypatch, which):
    """Of an adapter that was trained before, TRL keeps a copy, "ref", which no step moves."""
    first = get_peft_model(build("llama"), loreft())
    randomise(first)
    first.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "first", is_trainable=True)
    trainer = make(which, base=model, peft_config=None, beta=0.1, max_steps=3)
    score, seen = trainer._get_per_token_logps_and_entropies, []
    add_fused_lm_head(first.get_base_model())
    first.eval()

    def spied(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-logits_to_keep] = -100
        with torch.no_grad():
            out = first(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
        of_first = torch.allclose(result[0], out.log_probs[:, -logits_to_keep:], atol=1e-5)
        seen.append((model.active_adapter, of_first))
        return result

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", spied)
    trainer.train()
    assert [same for name, same in seen if name == "ref"] == [True] * 3
    of_policy = [same for name, same in seen if name == "default"]
    assert of_policy[0] and not any(of_policy[-2:])


# Other trainers and settings


@pytest.mark.slow
@pytest.mark.cell(SECTION, "GMPO, A2PO")
def test_relatives(make, monkeypatch, tokenizer, tmp_path):
    from trl.experimental.a2po import A2POConfig, A2POTrainer
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    trainer = make((GMPOTrainer, GMPOConfig), max_steps=2)
    recorded = Recorded(monkeypatch, trainer)
    assert_all_moved(trainer.model, trainer.train)
    assert recorded.compared
    plain = "LoReFT takes every row of this forward for a prompt"
    for data, marks in ((CHATS, chat_marks(tokenizer)), (CHATS, {}), (TEXT, {})):
        model = get_peft_model(build("llama"), loreft(**marks))
        randomise(model)
        trainer = A2POTrainer(
            model,
            reward_funcs=alternating,
            args=arguments(A2POConfig, tmp_path, beta2=1.0, num_value_samples=2, max_completion_length=4),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
        if data is TEXT:  # the forward is given neither labels nor `logits_to_keep`
            with pytest.raises(ValueError, match="cannot tell where the prompts end"):
                trainer.train()
        elif marks:
            assert_all_moved(trainer.model, trainer.train)
            # The reference is a copy of the model: at first it gives the log-probs that the policy gives.
            assert logs(trainer, "implicit_reward")[0] == pytest.approx(0, abs=1e-4)
        else:  # the copy was made before the Trainer found the headers
            with pytest.warns(UserWarning, match=plain):
                trainer.train()


@BOTH
@pytest.mark.cell(SECTION, "GRPO, RLOO with Liger's head", refused="TRL's own fused head takes its place")
def test_ligers_head_is_refused(make, which):
    """Of Liger, TRL applies the kernels of layers alone. These need a GPU."""
    kernels = {"fused_linear_cross_entropy": True}
    with pytest.warns(FutureWarning, match="use_liger_kernel"), pytest.raises(ValueError, match="fused LM head"):
        make(which, use_liger_kernel=True, liger_kernel_config=kernels)


@pytest.mark.parametrize(
    ("which", "module"), [("AsyncGRPO", "async_grpo"), ("AsyncDistillation", "async_distillation")]
)
@pytest.mark.cell(SECTION, "AsyncGRPO, AsyncDistillation", refused="they send a server merged weights, or LoRA")
def test_asynchronous_trainers_are_refused(which, module, model_id, tokenizer, tmp_path):
    """An adapter that can be merged is another matter: these trainers are not run here, they need GPUs."""
    found = importlib.import_module(f"trl.experimental.{module}")
    rewards, settings = dict(reward_funcs=lambda completions, **kwargs: [0.0]), {}
    if which == "AsyncDistillation":
        rewards, settings = {}, dict(model_init_kwargs={"attn_implementation": "sdpa"})  # by default FlashAttention 3
    args = arguments(getattr(found, f"{which}Config"), tmp_path, **settings)
    with pytest.raises(ValueError, match=rf"{which}Config.*merged weights.*no single weight.*rollouts_in_vllm"):
        getattr(found, f"{which}Trainer")(
            model=model_id,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "a b c"}] * 4),
            processing_class=tokenizer,
            peft_config=LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2"),
            **rewards,
        )
