"""A base in GPTQ's 4 bits. `make test-extras` has gptqmodel, in an environment of its own: it needs an older numpy."""

import contextlib

import pytest
import torch
from conftest import VOCAB, WIDER, randomise
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_reft import LoReftConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)  # its own


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    gptqmodel = pytest.importorskip("gptqmodel")
    full, folder = tmp_path_factory.mktemp("full"), tmp_path_factory.mktemp("gptq")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **WIDER)).save_pretrained(full)
    save_tokenizer(full)
    model = gptqmodel.GPTQModel.load(str(full), gptqmodel.QuantizeConfig(bits=4, group_size=32), device="cpu")
    ids = torch.randint(3, VOCAB, (8, 1, 64))
    with contextlib.chdir(folder):  # it writes logs to where it stands
        model.quantize([dict(input_ids=row, attention_mask=torch.ones_like(row)) for row in ids], batch_size=1)
    model.save(str(folder))
    return folder


def save_tokenizer(folder):
    """gptqmodel wants one beside the weights."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(n): n for n in range(VOCAB)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token="0", eos_token="2").save_pretrained(
        folder
    )


@pytest.mark.cell("Quantised bases", "GPTQ, 4 bits (gptqmodel)")
def test_gptq(quantised, tmp_path):
    def base():
        model = AutoModelForCausalLM.from_pretrained(quantised)
        assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        return model

    model = get_peft_model(base(), LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2"))
    randomise(model)
    ids = torch.randint(3, VOCAB, (2, 12))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :8] = -100
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in weights.items()}
    losses = []
    model.train()
    for _ in range(5):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in weights.items())

    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    prompts = dict(input_ids=ids[:, :8], attention_mask=mask[:, :8])
    rounding = dict(
        atol=1e-2, rtol=1e-2
    )  # gptqmodel takes other kernels once a model has trained, and computes in bf16
    with torch.no_grad():
        logits = model(**prompts).logits
        torch.testing.assert_close(again(**prompts).logits, logits, **rounding)
        with model.disable_adapter():
            without = model(**prompts).logits
        assert (without - logits).abs().max() > 0.1
        assert again.generate(**prompts, max_new_tokens=4, do_sample=False).shape == (2, 12)
        torch.testing.assert_close(again.unload()(**prompts).logits, without, **rounding)
