"""Reads what a user wrote into a validated section of the config, and explains in words what is wrong with it.

    section.py    the base class of all sections, and the types of fields that several sections share
    loading.py    from a file or a command line to a section, or to one error that lists every problem
    reading.py    YAML files and values, of bounded size; a config merged over its base; overrides a.b=c
    arguments.py  sorts a command line into paths, overrides and flags
    schema.py     which keys a section has, and in words which values each of them takes
    problems.py   the text of errors: what came, what is wanted, what to write instead
    aliases.py    the names that other trainers use for our keys
    paths.py      which paths and addresses are accepted
    completing.py what may stand in place of an unfinished key or value, for completion in a shell
    reference.py  every key with type, default and meaning: --help and docs/config.md

Nothing here knows which sections there are (varfast/config.py joins them), and nothing imports PyTorch.
"""
