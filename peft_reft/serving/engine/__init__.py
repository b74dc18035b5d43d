"""Everything of vLLM that the plugin touches. No other module imports vLLM or reads an attribute of its objects.

The other modules hold vLLM's objects as `object`, which mypy lets nobody look into, and hand them to the functions of
this package. vLLM is imported inside functions, because `peft_reft.serving` is imported without vLLM, too.

Each module begins with a table of what it reads, calls or replaces, and since which version of vLLM that has been
tested (tests/test_engine_table.py compares the tables with the code).

=========== ========================================================
module      its part of vLLM
=========== ========================================================
`config`    the engine's config
`request`   a request, as front end, core and worker hold it
`worker`    the worker
`runners`   its model runner, of which vLLM has two
`core`      the core, between front end and worker
`front`     the front end
`openai`    the OpenAI server
=========== ========================================================
"""
