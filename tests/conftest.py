"""Tiny random models and a tiny tokenizer, built in code: no network, deterministic."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and pytest-xdist has a worker for each core

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB, HIDDEN, LAYERS = 64, 32, 3
DIMENSIONS = dict(hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4)
WIDER = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
"""As wide as kernels for quantised weights need."""
SIZES = dict(
    DIMENSIONS,
    vocab_size=VOCAB,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(SIZES, num_key_value_heads=2)

CAUSAL = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(GQA, head_dim=8)),
    "mistral": ("MistralForCausalLM", "MistralConfig", GQA),
    # A sliding window shorter than the prompts, so that its caches forget.
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(GQA, head_dim=8, sliding_window=8)),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(SIZES, ffn_dim=48, word_embed_proj_dim=HIDDEN)),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES),
}
SEQ_CLS = {
    "bert": ("BertForSequenceClassification", "BertConfig", dict(SIZES, num_labels=3)),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", dict(SIZES, num_labels=3)),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of that family."""
    model_name, config_name, sizes = {**CAUSAL, **SEQ_CLS}[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**sizes)
    model = getattr(transformers, model_name)(config).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None  # every test chooses how many tokens it wants
    return model


def greedy_answer(model: torch.nn.Module, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities from `generate`, for one prompt alone."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = out.sequences[0, len(prompt) :].tolist()
    return found, [logits[0].log_softmax(-1)[token].item() for logits, token in zip(out.logits, found)]


def randomise(model: torch.nn.Module, scale: float = 0.5, seed: int = 1) -> None:
    """Give every adapter weight a random value, so that edits are large enough to see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loreft_weights" in name and not name.endswith(".R"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


pytest_plugins = ["support_table"]

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
WORDS = ["system", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz", *"0123456789"]
assert len(SPECIAL + WORDS) <= VOCAB

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model_id(tmp_path, tokenizer):
    """A folder with a tiny model and its tokenizer."""
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def make_tokenizer():
    """One token a word; ids 0, 1, 2 are pad, bos, eos as in the tiny models; ChatML."""
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=256,
    )
    tokenizer.chat_template = CHATML
    return tokenizer
