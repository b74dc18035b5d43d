"""Plugins for trainers, one module for each."""
