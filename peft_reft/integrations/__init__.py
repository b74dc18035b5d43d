"""What this package adds to trainers and engines that have a plugin system.

One module for each of them; a module uses only what that trainer or engine offers to plugins.

- `trainer`: transformers' Trainer, and with it TRL's trainers, by callbacks. `trainer_checks`: what is checked there.
- `not_learning`: a callback that warns of a run that does not learn; `learning` judges it, from losses alone.
- `edit_norms`: `LogEditNorms`, a callback for those who want it, which logs how much each layer edits.
- `cards`: the model cards that trainers write. No callback hears of them, so these methods are wrapped.
- `swift`: ms-swift, by its plugins. Two of its methods are wrapped besides.
- `trl`: TRL's rollouts in vLLM, for those who want them. TRL asks no plugin, so its methods are wrapped.
- `axolotl`: LoReFT as one of axolotl's adapters, by a plugin that its YAML names.

The vLLM plugin has its own room, `serving/`.
"""
