"""A backend for Triton that says it is active, so that vLLM's second model runner runs on a CPU. For tests only.

With `TRITON_INTERPRET=1` kernels run in Triton's interpreter, which asks no backend. But vLLM looks for an active one.
Triton finds backends by their entry points, so this folder on `PYTHONPATH` is enough, in subprocesses too.
"""
