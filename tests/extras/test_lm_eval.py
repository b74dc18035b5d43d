"""lm-evaluation-harness with an adapter: its log-likelihoods are those of a forward that knows the prompt."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import build
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_reft import LoReftConfig

lm_eval = pytest.importorskip("lm_eval")
EXAMPLE = Path(__file__).parents[2] / "examples" / "lm_eval_loreft.py"
ROWS = [("a b c d e f", ["1 2", "3", "4 5 6"], 1), ("g h", ["i", "j k"], 0), ("l m n o", ["p q r s", "t"], 1)]


@cache
def loreft_lm_class():
    spec = importlib.util.spec_from_file_location("lm_eval_loreft", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoReftLM


@pytest.fixture
def loreft_lm(tmp_path, tokenizer):
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f1+l2", init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), config).save_pretrained(
        tmp_path / "adapter"
    )
    return loreft_lm_class(), {
        "pretrained": str(tmp_path / "model"),
        "peft": str(tmp_path / "adapter"),
        "device": "cpu",
        "dtype": "float32",
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods(loreft_lm, tmp_path, tokenizer, batch_size):
    lm_class, arguments = loreft_lm
    data = tmp_path / "rows.jsonl"
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in ROWS]
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    lm = lm_class(**arguments, batch_size=batch_size)
    results = lm_eval.simple_evaluate(model=lm, tasks=[task], log_samples=True, bootstrap_iters=0)
    base = AutoModelForCausalLM.from_pretrained(arguments["pretrained"])
    base.resize_token_embeddings(len(tokenizer))  # as lm-eval does
    model = PeftModel.from_pretrained(base, arguments["peft"])
    model.eval()
    checked = 0
    for sample in results["samples"]["tiny"]:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        for choice, response in zip(choices, sample["filtered_resps"]):
            prompt = tokenizer(question)["input_ids"]
            whole = tokenizer(f"{question} {choice}")["input_ids"]
            labels = [-100] * len(prompt) + whole[len(prompt) :]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).logits[0]
            log_probs = logits.log_softmax(-1)
            expected = sum(log_probs[n - 1, whole[n]].item() for n in range(len(prompt), len(whole)))
            assert float(response[0]) == pytest.approx(expected, abs=1e-4)
            checked += 1
    assert checked == sum(len(choices) for _, choices, _ in ROWS)
