"""Puts LoReFT into a model: the layers, the hooks, and what the layers of one forward share.

To read it, begin with `model` (how an adapter gets into a model), then follow a forward: `hooks`, `forward`, `layer`.

An adapter's life:

- `model`: `LoReftModel`, which PEFT calls to add, save, load, merge and unload an adapter.
- `targets`: which modules a config edits, each with its positions and rank.
- `architectures`: where a model has its blocks, and how large their hidden states are.
- `conflicts`: targets whose edits would be lost, refused.
- `state_dicts`: the tensors of one adapter in a state dict.
- `older_peft`: the same for PEFT 0.20, which asks no tuner about them.
- `weighted`: an adapter that is the weighted sum of others.
- `merging`: adapters folded into the weights of a model.
- `folding`: an edit folded into one linear map.

A forward:

- `hooks`: begin and end a forward; the wrapped `forward`.
- `reading`: where the positions of a forward come from.
- `generate`: the wrapped `generate`.
- `caches`: what a model's cache holds.
- `forward`: `Forward`, the object that all layers share while one forward runs.
- `layer`: `LoReftLayer`, the child of a block that edits its output.
- `exchange`: hidden states of another run, put into this one (`peft_reft.interchange`).
- `mixed_batches`: an adapter for each row, for modules that PEFT trains beside LoReFT.
- `checkpointing`: activation checkpointing runs a part again, within its `Forward`.
- `tracing`: an export that would lose the edits, refused.

Private symbols of PEFT
-----------------------

`tests/test_peft_symbols.py` has the signature of each of these, and fails if one is missing here. PEFT documents the
methods of `BaseTuner` in the first part for authors of methods: overriding them is the only way to add a method.

=========================================  ===========================================================  =============
symbol                                     used for                                                     public way
=========================================  ===========================================================  =============
**overridden**
`_prepare_adapter_config`                  decides what is edited, before anything is changed           none
`_prepare_model`                           takes out what a replaced adapter trained beside LoReFT      none
`_check_target_module_exists`              names the modules to edit                                    none
`_check_target_module_compatiblity`        drops a check of weights that LoReFT does not bypass         none
`_cast_adapter_dtype`                      `autocast_adapter_dtype=False` takes the block's type        none
`_create_and_replace`                      adds a child to a module, and replaces nothing               none
`_replace_module`                          unloads other wrappers without copying a weight              none
`_check_merge_allowed`                     called before a merge                                        none
`_unload_and_optionally_merge`             checks a merge first; takes hooks out                        none
`_get_adapter_state_dict`                  saves R with orthonormal rows; restores dropped keys         none
`_remove_adapter_name_from_key`            adapters may have names that are parts of keys               none
`_remap_adapter_state_dict_for_load`       refuses files that do not fit                                none
`_move_adapter_to_device_of_base_layer`    a block has no `weight` that has the device                  none
`_enable_peft_forward_hooks`               hands `adapter_names` to the layers                          none
**called**
`_maybe_include_all_linear_layers`         `target_modules="all-linear"` names what LoRA's names        none
`_get_input_embeddings_name`               the module that `trainable_token_indices` will wrap          none
`_get_module_names_tied_with_embedding`    the modules that are wrapped with it                         none
`_get_available_adapters`                  adapters of a wrapper (`modules_to_save`, trained tokens)    none
`_error_message_name`                      the config's field that made a wrapper, for messages         none
=========================================  ===========================================================  =============
"""
