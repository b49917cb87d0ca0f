"""Command-line code that all scripts share: options from dataclasses, YAML configs, one-line errors and exit statuses."""

import argparse
import dataclasses
import errno
import math
import sys
from dataclasses import fields
from itertools import takewhile
from pathlib import Path

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # of a full disk, a full quota and a file that is too large


class UserError(Exception):
    """An error that the user can fix. The message is one sentence: what is wrong and what to do."""


class Stopped(Exception):
    """A run that was told to stop did so before its training began. The message says how far it came; "" where another process says it."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors as one line on stderr and exit status 2, like every other user error."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def option(default, help):
    """A dataclass field with its default and its help on the command line."""
    return dataclasses.field(default=default, metadata={"help": help})


def add_options(parser, config):
    """Add an option for each field of the dataclass `config` to the parser, with the field's default and help."""
    group = parser.add_argument_group(config.__name__)
    for field in dataclasses.fields(config):
        flag, text = f"--{field.name}", field.metadata.get("help", "(default: %(default)s)")
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif isinstance(field.default, tuple):
            group.add_argument(flag, nargs="*", default=field.default, help=text)
        else:
            group.add_argument(flag, type=type(field.default), default=field.default, help=text)


def take_options(arguments, config):
    """An instance of the dataclass `config`, from the parsed options that add_options added."""
    return config(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(config)})


def with_config(arguments):
    """Command-line arguments with `--config FILE` replaced by the options in that YAML file; those of the command line win."""
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
    # Positional arguments come first, then lists, so that neither is taken for the rest of a list.
    leading = [*takewhile(lambda part: not part.startswith("-"), rest)]
    for name, value in sorted(options.items(), key=lambda item: not isinstance(item[1], list)):
        if isinstance(value, bool):
            read.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            read += [f"--{name}", *map(str, value)]
        else:
            read.append(f"--{name}={'' if value is None else value}")
    return leading + read + rest[len(leading):]


def printable(text):
    """The text with control characters, and others that a terminal cannot show, escaped."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape", "backslashreplace").decode()
                   for character in text)


def run(main):
    """Call `main()` and exit with its status, or, after a UserError, with 2 and one line on stderr.

    Ctrl-C, a full disk and a full GPU also give one line. Other errors are unexpected: Python prints the traceback and exits with 1.
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
        status = 130  # as shells report it
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" for {printable(str(error.filename))}" if error.filename else ""
        print(f"{Path(sys.argv[0]).name}: {error.strerror}{where}", file=sys.stderr)
        status = 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every script imports
            raise
        print(f"{Path(sys.argv[0]).name}: the GPU is out of memory: lower --batch_size, or for training raise "
              "--accumulation", file=sys.stderr)
        status = 1
    sys.exit(status or 0)


def whole_numbers(name, values):
    """The values of an option with several whole numbers: a tuple. Raises UserError."""
    try:
        return tuple(map(int, values))
    except ValueError as error:
        raise UserError(f"--{name} takes whole numbers: {error}") from None


def check_settings(settings, at_least_one=(), fractions=(), signed=()):
    """Raise UserError unless all numeric fields of a dataclass are valid: finite, and at least 0 unless named in `signed`; those
    in `at_least_one` at least 1; those in `fractions` below 1."""
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
