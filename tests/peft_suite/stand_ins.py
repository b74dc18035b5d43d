"""Tiny models, with random weights, under the names of the Hub models that PEFT's tests load.

They are written as the Hub's own cache lays its files out, so that `from_pretrained("org/name")` finds them offline,
with the name that the tests expect in configs and model cards. Sizes are those that the tests need: two layers, wide
enough for LoRA's ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers

COMMIT = "0" * 40
WORDS = 1024
SPECIAL = {"pad_token_id": 1023, "bos_token_id": 1021, "eos_token_id": 1022}
# The wide init makes outputs differ visibly between an adapter and none, also after a random head.
SHAPE = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
WIDE = {"initializer_range": 0.2}
GATED = {"intermediate_size": 64, "num_key_value_heads": 4, **WIDE}
# A pad token that RoBERTa has a position for.
BERT = {**SHAPE, "pad_token_id": 0, "intermediate_size": 64, **WIDE}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OPT = {**SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 32, "init_std": 0.2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, **SPECIAL, **WIDE}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
      "eos_token_id": 1, "decoder_start_token_id": 0, "initializer_factor": 3.0}  # fmt: skip
BART = {"vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.2}  # fmt: skip
GEMMA3 = {**SHAPE, **GATED, "head_dim": 8, "sliding_window": 32}
GPTJ = {**GPT2, "rotary_dim": 4}
NEOX = {**SHAPE, "intermediate_size": 64, **WIDE}
BLOOM = {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL, **WIDE}
LLAMA = {**SHAPE, **GATED}

OURS, TRL, HF = "peft-internal-testing/", "trl-internal-testing/", "hf-internal-testing/"
# name on the Hub: model class, fields of its config
STAND_INS: dict[str, tuple[type, dict]] = {
    # One test counts on the width of this one.
    OURS + "opt-125m": (tf.OPTForCausalLM, {**OPT, "hidden_size": 768, "word_embed_proj_dim": 768}),
    OURS + "tiny-random-OPTForCausalLM": (tf.OPTForCausalLM, OPT),
    OURS + "tiny-random-GPT2LMHeadModel": (tf.GPT2LMHeadModel, GPT2),
    OURS + "tiny-random-gpt2": (tf.GPT2LMHeadModel, GPT2),
    HF + "tiny-random-gpt2": (tf.GPT2LMHeadModel, GPT2),
    OURS + "tiny-random-GPTJForCausalLM": (tf.GPTJForCausalLM, GPTJ),
    OURS + "tiny-random-GPTNeoXForCausalLM": (tf.GPTNeoXForCausalLM, NEOX),
    OURS + "tiny-random-BloomForCausalLM": (tf.BloomForCausalLM, BLOOM),
    OURS + "tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, LLAMA),
    TRL + "tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, LLAMA),
    HF + "tiny-random-MistralForCausalLM": (tf.MistralForCausalLM, LLAMA),
    OURS + "tiny-dummy-qwen2": (tf.Qwen2ForCausalLM, LLAMA),
    HF + "tiny-random-Gemma3ForCausalLM": (tf.Gemma3ForCausalLM, GEMMA3),
    OURS + "tiny-random-T5ForConditionalGeneration-calibrated": (tf.T5ForConditionalGeneration, T5),
    OURS + "tiny-random-T5ForConditionalGeneration": (tf.T5ForConditionalGeneration, T5),
    OURS + "tiny-random-t5": (tf.T5ForConditionalGeneration, T5),
    "google/flan-t5-small": (tf.T5ForConditionalGeneration, T5),
    OURS + "tiny-random-BartForConditionalGeneration": (tf.BartForConditionalGeneration, BART),
    OURS + "tiny-random-BertModel": (tf.BertModel, BERT),
    OURS + "tiny-random-RobertaModel": (tf.RobertaModel, BERT),
    OURS + "tiny-random-DebertaModel": (tf.DebertaModel, DEBERTA),
    OURS + "tiny-random-DebertaV2Model": (tf.DebertaV2Model, DEBERTA),
    OURS + "tiny-random-BertForSequenceClassification": (tf.BertForSequenceClassification, BERT),
    OURS + "tiny-random-RobertaForSequenceClassification": (tf.RobertaForSequenceClassification, BERT),
    TRL + "tiny-LlamaForSequenceClassification-3.2": (tf.LlamaForSequenceClassification, LLAMA),
}


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Whole words: "w0", "w1" ... and "<unk>" for all others."""
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="w1021", eos_token="w1022", pad_token="w1023"
    )


def make_stand_ins(cache: Path) -> None:
    """Write the models that are not there yet into `cache`, a folder in the layout of `HF_HUB_CACHE`."""
    for name, (model_class, fields) in STAND_INS.items():
        folder = cache / ("models--" + name.replace("/", "--"))
        if (folder / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**fields)).eval()
        model.save_pretrained(folder / "snapshots" / COMMIT)
        tokenizer().save_pretrained(folder / "snapshots" / COMMIT)
        _refer(folder, "main")  # last: a folder that was left half written is made again
    folder = cache / "models--peft-internal-testing--tiny-opt-lora-revision"
    LoraConfig(base_model_name_or_path=OURS + "opt-125m").save_pretrained(folder / "snapshots" / COMMIT)
    _refer(folder, "test")


def _refer(folder: Path, revision: str) -> None:
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
