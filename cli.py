"""What every script's command line shares: one-line errors, exit statuses, files written whole."""

import argparse
import dataclasses
import errno
import math
import sys
from dataclasses import fields
from pathlib import Path

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # what a file system says that has no room


class UserError(Exception):
    """A mistake that the user can mend. The message is one sentence: what is wrong and what to do."""


class Stopped(Exception):
    """A run that was told to stop did so before its training began. The message says how far it came; "" where another process says it."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one line on stderr and exit status 2, like every other user error."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def option(default, help):
    """A field of a dataclass with its default and what the command line says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


def add_options(parser, config):
    """Give the parser an option for each field of the dataclass `config`, with its default and its help."""
    group = parser.add_argument_group(config.__name__)
    for field in dataclasses.fields(config):
        flag, text = f"--{field.name}", field.metadata.get("help", " ")
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif isinstance(field.default, tuple):
            group.add_argument(flag, nargs="*", default=field.default, help=text)
        else:
            group.add_argument(flag, type=type(field.default), default=field.default, help=text)


def take_options(arguments, config):
    """The dataclass `config` from parsed arguments that add_options declared."""
    return config(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(config)})


def with_config(arguments):
    """Command-line arguments with `--config FILE` replaced by the options that the YAML file names, which come first."""
    finder = ArgumentParser(add_help=False)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(arguments)
    if found.config is None:
        return rest
    import yaml

    try:
        options = yaml.safe_load(Path(found.config).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {found.config}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the config {found.config} is not YAML: {error}") from None
    if not isinstance(options, dict) or "config" in options:
        raise UserError(f"the config {found.config} is not a list of `option: value`")
    read = []
    for name, value in options.items():
        if isinstance(value, bool):
            read.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            read += [f"--{name}", *map(str, value)]
        else:
            read.append(f"--{name}={'' if value is None else value}")
    return read + rest


def printable(text):
    """The text with an escape for each character that a terminal would act on, or cannot show."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape", "backslashreplace").decode()
                   for character in text)


def run(main):
    """Call `main()` and exit: with its status, or with 2 and one line on stderr after a UserError.

    Anything else is unexpected: Python prints the traceback and exits with 1.
    """
    try:
        status = main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        status = 2
    except Stopped as stopped:
        if str(stopped):
            print(stopped, flush=True)
        status = 0
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        status = 130  # as a shell reports it
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" for {printable(str(error.filename))}" if error.filename else ""
        print(f"{Path(sys.argv[0]).name}: {error.strerror}{where}", file=sys.stderr)
        status = 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every script imports
            raise
        print(f"{Path(sys.argv[0]).name}: the GPU has no room for so much at a time: lower --batch_size, or for training raise "
              "--accumulation", file=sys.stderr)
        status = 1
    sys.exit(status or 0)


def check_settings(settings, at_least_one=(), fractions=(), signed=()):
    """Raise UserError unless every number among a dataclass's fields is finite and, but for those `signed`, at least 0; these
    fields at least 1, and those from 0 to below 1."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, (int, float)):
            if not math.isfinite(value):
                raise UserError(f"--{field.name} is {value}, but must be a number")
            least = 1 if field.name in at_least_one else 0
            if value < least and field.name not in signed:
                raise UserError(f"--{field.name} is {value}, but must be at least {least}")
            if field.name in fractions and value >= 1:
                raise UserError(f"--{field.name} is {value}, but must be at least 0 and below 1")
