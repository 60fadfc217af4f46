"""From what a user wrote to a validated section, and back to the user in words: YAML, overrides, errors, --help.

    reading.py    YAML files and values, bounded; a config over its base; overrides a.b=c
    arguments.py  what stands on a command line: paths, overrides, flags
    schema.py     what a schema's keys are, and what each one wants
    problems.py   what is wrong with a config, and what to write instead
    aliases.py    the names that other trainers give to our keys
    paths.py      what a path may be
    reference.py  every key with type, default and meaning: --help and docs/config.md

Nothing here knows the config itself (varfast/config.py), nor imports PyTorch.
"""
