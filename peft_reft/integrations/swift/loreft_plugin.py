"""The file for ms-swift's `--external_plugins`; `peft-reft swift-plugin` prints its path."""

import peft_reft.integrations.swift  # noqa: F401  # adds `--tuner_type loreft`
