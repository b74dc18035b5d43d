"""What LoReFT deliberately does otherwise than PEFT's tests expect: the only failures of `make test-peft`."""

from __future__ import annotations

from typing import NamedTuple


class Difference(NamedTuple):
    tests: str
    """A regular expression, searched in a test's id."""
    message: str
    """Another, searched in the type and message of its error."""
    reason: str


# Ids of PEFT's small networks whose edited module is not a linear map.
NOT_LINEAR = r"(Embedding \+ transformers Conv1D [23]|MHA)"
MERGES = r"test_(merge_layers|safe_merge|delete_merged|disable_adapters_with_merging|forward_b?float16)\w*"
REFUSED = "ValueError: LoReFT cannot be merged into the weights: "

DIFFERENCES = [
    Difference(
        r"test_multiple_active_adapters_forward\[LoReFT Different",
        "ValueError: The weighted sum is no single edit: target_modules",
        "A weighted sum is one adapter, on one set of modules; those of unlike targets are activated together.",
    ),
    Difference(
        r"test_from_pretrained_sanity_check\[LoReFT",
        "ValueError: ",
        "A damaged adapter_config.json is one kind of error, which names the file.",
    ),
    Difference(
        r"test_save_pretrained_targeting_lora_to_embedding_layer\[LoReFT-(auto|True)",
        "AssertionError",
        "PEFT saves an embedding that an adapter is on if it has a `base_layer`, which an edited module has not.",
    ),
    Difference(
        r"test_merge_layers\w*\[LoReFT( with tokens| untied)*-",
        REFUSED + "a block's output is edited",
        "A block's output, or that of some tokens, is edited: no single weight does that.",
    ),
    Difference(
        r"test_merge_layers\[LoReFT on mlp.*(Llama|qwen2|Gemma3)|"
        r"trainable_tokens.*test_disable_adapters_with_merging\[LoReFT",
        REFUSED + "a Linear without a bias would get one",
        "merge_adapter makes no bias that the base lacks: who reads the weights by the base's names would drop it.",
    ),
    Difference(
        r"feature_extraction_models.*test_merge_layers\w*\[LoReFT on mlp",
        REFUSED + r".* adds the residual stream",
        "BERT's and DeBERTa's MLP adds the residual stream inside: the edited output is no linear map's.",
    ),
    Difference(
        rf"{MERGES}\[(.*-)?{NOT_LINEAR}",
        REFUSED,
        "The output of an embedding or of nn.MultiheadAttention is edited, which no nn.Linear makes.",
    ),
    Difference(
        r"LoReFT on mlp.*T5For",
        "component='mlp': encoder.block.0 .* has no module of that kind",
        "T5 has no module whose output is the MLP's by a name that is known: it is refused with the names there are.",
    ),
    Difference(
        r"test_save_pretrained\w*_pickle\[.*LoReFT",
        "ValueError: safe_serialization=False",
        "Adapters are written and read as safetensors only.",
    ),
    Difference(
        r"test_parameters_after_loading_model\[(Vanilla|MHA).*LoReFT",
        "AssertionError",
        "R is saved as it computes, orthonormal; the parameter that is trained behind it is another matrix.",
    ),
    Difference(
        r"test_only_params_are_updated\[Embedding \+ transformers Conv1D [13] LoReFT",
        "AssertionError",
        "That layer has one output: an orthonormal R is 1 or -1 and stays so.",
    ),
    Difference(
        r"test_set_(adapter_non_overlapping_modules|adapter_non_overlapping_modules_to_save|requires_grad)\[LoReFT",
        "'Linear' object has no attribute '(active_adapters|adapter_layer_names)'",
        "The layer is a child of the module, which keeps its class and its name, and not around it.",
    ),
    Difference(
        r"test_default_target_modules_\w*\[LoReFT",
        "get_encoder|Regex pattern did not match",
        "Without target_modules the blocks are edited, of any architecture; there is no table by model type.",
    ),
    Difference(
        r"test_config_layers_to_transform_index_zero\[LoReFT",
        "layers_pattern='model.layers' needs target_modules",
        "Blocks are found without layers_pattern; it counts only for target_modules.",
    ),
    Difference(
        r"test_base_model_module_named_like_peft_prefix\[LoReFT",
        "KeyError",
        "The test has a table of prefixes, of two methods.",
    ),
    Difference(
        r"test_(merge_layers_multi|multiple_active_adapters_\w+)\[LoReFT \+ trainable tokens|"
        r"test_mixed_adapter_batches_unsupported_layer_raises\[LoReFT",
        "LoReFT (edits tokens|was given positions for a batch of)",
        "Those networks edit (batch, d), or flatten the tokens before the layer: there are no tokens to edit.",
    ),
    Difference(
        r"test_mixed_adapter_batches_mha_raises\[LoReFT",
        "DID NOT RAISE|assert False",  # it expects a refusal; where rounding is kind, there is none
        "LoReFT edits the output of nn.MultiheadAttention, so rows may have adapters of their own.",
    ),
    Difference(
        r"test_decoder_models.*gradient_checkpointing\[(True|False)-LoReFT( untied)?( with tokens)?-",
        "LoReFT cannot tell where the prompts end",
        "In training, without labels, marks or positions, the ends of prompts are not guessed.",
    ),
    Difference(
        r"test_weighted_combination_of_adapters\[LoReFT(?!.* with tokens)",
        "combination_type='ties_svd' is an approximation",
        "Sums are exact or refused; LoRA's approximations of sums are not offered.",
    ),
    Difference(
        r"test_weighted_combination_of_adapters\[LoReFT.* with tokens",
        "trainable_token_indices=.*, which cannot be added up",
        "Trained tokens replace rows of the embeddings and are no sums; LoRA leaves them out.",
    ),
]
